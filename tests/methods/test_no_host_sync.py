"""A step reads no number on the host: that would let a GPU run dry.

Tensors of the meta device have no numbers, so whatever reads one raises. Data that goes up from the host is seen by
the recorder of `benchmarks.counts`. What a method does on CUDA alone is not seen.
"""

from dataclasses import replace

import pytest
import torch

from benchmarks.operators import META, meta_batch, record
from mimir_fast.methods.classification import ClassificationMethod
from mimir_fast.methods.registry import all_methods
from mimir_fast.models.classifier import ClassifierConfig, build_classifier
from mimir_fast.models.masked_model import ModelConfig, build_masked_model

SIDE = 64
NANO = {"encoder": "nano", "patch_size": 8}


@pytest.mark.parametrize("name", all_methods("pretrain"))
def test_pretraining(name):
    entry = all_methods("pretrain")[name]
    method = entry.build(entry.config())
    config = ModelConfig(**NANO, adapters=entry.adapters)
    config = replace(config, decoder=entry.decoder) if entry.decoder else config
    with META:
        model = build_masked_model(config, SIDE, num_classes=10 if entry.labels else 0).train()
    recorder = record(lambda: method(model, meta_batch(4, SIDE), seed=0, step=1)["loss"])
    assert recorder.calls and not recorder.uploads


@pytest.mark.parametrize("name", all_methods("finetune"))
def test_finetuning(name):
    entry = all_methods("finetune")[name]
    method = entry.build(entry.config())
    assert isinstance(method, ClassificationMethod)
    with META:
        model = build_classifier(ClassifierConfig(**NANO, drop_path=0.1), SIDE, 10).train()
    recorder = record(lambda: method(model, meta_batch(4, SIDE), seed=0, step=1)["loss"])
    assert recorder.calls and not recorder.uploads


@pytest.mark.parametrize("read", [torch.Tensor.item, bool, torch.Tensor.nonzero, torch.Tensor.cpu])
def test_a_read_is_caught(read):
    weight = torch.ones((), device=META, requires_grad=True)

    def loss():
        value = weight * 2
        read(value)
        return value

    with pytest.raises((RuntimeError, NotImplementedError)):
        record(loss)


def test_an_upload_is_caught():
    weight = torch.ones(3, device=META, requires_grad=True)
    assert record(lambda: (weight * torch.ones(3).to(META)).sum()).uploads == 1
