"""Compiled models and layers: as many graphs as situations, none twice, none broken, and no limit reached."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from mimir_fast.attacks.pgd import cross_entropy, pgd
from mimir_fast.attacks.threat_model import LinfThreat
from mimir_fast.data.batch import Batch
from mimir_fast.layers.borrowing import GUARDS_FROZEN, borrowed, frozen_flags
from mimir_fast.methods.classification import ClassificationConfig
from mimir_fast.methods.mimir import Mimir, MimirConfig
from mimir_fast.methods.pgd import Pgd
from mimir_fast.methods.probe import probe
from mimir_fast.models.classifier import Classifier, ClassifierConfig, build_classifier
from mimir_fast.models.masked_model import MaskedModel, ModelConfig, View, build_masked_model
from mimir_fast.training import compile as compiling
from mimir_fast.training.compile import compile_modules
from mimir_fast.training.distributed import parallelize
from mimir_fast.world import World


@pytest.fixture(autouse=True)
def strict(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A reached limit is an error, and counting starts at nothing."""
    monkeypatch.setenv("MIMIR_FAST_ATTENTION", "sdpa")
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


def batch_of(size: int) -> Batch:
    samples = torch.arange(size)
    images = torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Batch(images, samples % 3, samples, torch.zeros_like(samples))


def shallow(model: MaskedModel | Classifier) -> Any:
    """Tracing takes its time for each layer; situations are as many with one."""
    if hasattr(model.encoder, "blocks"):
        model.encoder.blocks = model.encoder.blocks[:1]
    return model


def compiled(model: MaskedModel | Classifier, whole: bool) -> nn.Module:
    compile_modules([model] if whole else model.layers(), backend="aot_eager")
    return model


def graphs_of(situations: list[Callable[[], object]]) -> int:
    """How many graphs they need, after seeing that no situation needs another one the second time."""
    for situation in situations:
        situation()
    graphs = counters["stats"]["unique_graphs"]
    for situation in situations:
        situation()
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    return graphs


# Whole: attack and training in two batch sizes are 4; the preview attacks once more and decodes everywhere without
# gradients, 1. By layers, ViT has those for encoder, decoder's first and last layer; Swin for its stages and shifts.
@pytest.mark.parametrize(
    ("family", "patch_size", "whole", "at_most"),
    [
        ("vit", 4, False, 20), pytest.param("vit", 4, True, 5, marks=pytest.mark.slow),
        *(pytest.param("swin", 2, whole, n, marks=pytest.mark.slow) for whole, n in ((True, 5), (False, 60))),
    ],
)  # fmt: skip
def test_each_situation_of_pretraining_has_one_graph(family: str, patch_size: int, whole: bool, at_most: int) -> None:
    config = ModelConfig(family=family, encoder="nano", patch_size=patch_size)
    eager, model = (shallow(build_masked_model(config, 32)) for _ in range(2))
    model.load_state_dict(eager.state_dict())
    compiled(model, whole)
    method = Mimir(MimirConfig())

    def train(size: int) -> torch.Tensor:
        model.zero_grad()
        loss = method(model, batch_of(size), seed=0, step=0)["loss"]
        loss.backward()
        assert all(p.grad is not None for p in model.layers()[0].parameters())
        return loss.detach()

    preview = lambda: method.preview(model, batch_of(4), seed=0, step=0)  # noqa: E731
    assert 0 < graphs_of([lambda: train(4), preview, lambda: train(3)]) <= at_most
    wanted = method(eager, batch_of(4), seed=0, step=0)["loss"]
    torch.testing.assert_close(train(4), wanted.detach(), rtol=1e-3, atol=1e-3)


# Training attacks and trains; the probe attacks and looks, in eval mode, on whole batches and a last short one.
@pytest.mark.parametrize(("whole", "at_most"), [pytest.param(True, 6, marks=pytest.mark.slow), (False, 6)])
def test_each_situation_of_fine_tuning_and_its_evaluation_has_one_graph(whole: bool, at_most: int) -> None:
    config = ClassifierConfig(encoder="nano", patch_size=4, drop_path=0.1)
    eager, model = (shallow(build_classifier(config, 32, 3)) for _ in range(2))
    model.load_state_dict(eager.state_dict())
    compiled(model, whole)
    method = Pgd(ClassificationConfig(attack=LinfThreat(num_steps=2)))

    def train() -> torch.Tensor:
        model.zero_grad()
        loss = method(model, batch_of(6), seed=0, step=0)["loss"]
        loss.backward()
        assert all(p.grad is not None for p in model.layers()[0].parameters())
        return loss.detach()

    def evaluate() -> None:
        assert probe(model, [batch_of(4), batch_of(4), batch_of(3)], LinfThreat(), num_steps=2).num_images == 11

    assert 0 < graphs_of([train, evaluate]) <= at_most
    wanted = method(eager, batch_of(6), seed=0, step=0)["loss"]
    torch.testing.assert_close(train(), wanted.detach(), rtol=1e-3, atol=1e-3)


def test_one_process_compiles_the_whole_and_recomputes_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `--compile --checkpoint_activations` makes: one graph, with the layers' recomputation in it."""
    monkeypatch.setattr(compiling.compile_modules, "__defaults__", ("aot_eager",))
    config = ModelConfig(encoder="nano", patch_size=8)
    eager, model = (shallow(build_masked_model(config, 32)) for _ in range(2))
    model.load_state_dict(eager.state_dict())
    world = World(0, 1, torch.device("cpu"))
    parallelize(model, "auto", world, bf16=False, compiled=True, checkpoint_activations=True)
    view = View(torch.rand(2, 4, 192), torch.arange(4).expand(2, 4))
    losses = [m(view).prediction.square().mean() for m in (eager, model)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)
    for loss in losses:
        loss.backward()
    for wanted, found in zip(eager.parameters(), model.parameters(), strict=True):
        if wanted.grad is not None:
            torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-3, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize("whole", [True, False])
def test_an_attack_inside_an_attack_leaves_no_trace(whole: bool) -> None:
    """The inner one gives back what it took, not what the outer one has taken."""
    torch.manual_seed(0)
    model = shallow(build_classifier(ClassifierConfig(encoder="nano", patch_size=8), 32, 3))
    torch.nn.init.normal_(model.head.weight, std=0.1)
    eager = shallow(build_classifier(model.config, 32, 3))
    eager.load_state_dict(model.state_dict())
    compiled(model, whole)
    images, labels, threat = torch.rand(4, 3, 32, 32), torch.arange(4) % 3, LinfThreat(0.1, 0.05, 2)
    freezable = [model] if whole else model.layers()
    with borrowed(model):
        pgd(model, images, labels, threat)
        assert all(flag.frozen for m in freezable for flag in frozen_flags(m))
        # Layers are not frozen where torch.compile would not notice.
        trains = not (whole or GUARDS_FROZEN)
        assert all(p.requires_grad == trains for m in freezable for p in m.parameters())
    assert [[flag.frozen for flag in frozen_flags(m)] for m in freezable] == [[False]] * len(freezable)
    wanted = [p.requires_grad for p in eager.parameters()]
    assert [p.requires_grad for p in model.parameters()] == wanted
    for m in (eager, model):
        cross_entropy(m(images), labels).mean().backward()
    for mine, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-5)


def test_a_reached_limit_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Outside of tests it is no error: torch warns, and the code concerned runs on without being compiled."""
    monkeypatch.setattr(compiling, "LIMIT", 1)
    model = shallow(build_masked_model(ModelConfig(encoder="nano", patch_size=8), 32))
    compiled(model, whole=True)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=False), caplog.at_level(logging.WARNING):
        monkeypatch.setattr(logging.getLogger("torch"), "propagate", True)
        for size in (2, 3):
            model(View(torch.rand(size, 4, 192), torch.arange(4).expand(size, 4)))
    assert "recompile_limit" in caplog.text


def test_the_cache_of_graphs_knows_the_instructions() -> None:
    with torch.compiler.config.patch(cache_key_tag="mine"):
        for _ in range(2):
            compile_modules([nn.Linear(2, 2)], backend="aot_eager")
        tag = torch.compiler.config.cache_key_tag
    before, found, after = tag.partition(torch.backends.cpu.get_cpu_capability())
    assert before.startswith("mine") and found and found not in after


@pytest.mark.slow
def test_processes_with_other_instructions_share_a_cache_folder(tmp_path: Path) -> None:
    """Without the tag, torch 2.14 takes the first one's graph in the second, which cannot compile it."""
    code = (
        "import torch; from mimir_fast.training.compile import compile_modules; torch.manual_seed(0);"
        "model = torch.nn.Sequential(torch.nn.Linear(33, 70), torch.nn.GELU(), torch.nn.LayerNorm(70));"
        "x = torch.randn(5, 33); wanted = model(x); compile_modules([model]);"
        "torch.testing.assert_close(model(x), wanted)"
    )
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    environment.pop("ATEN_CPU_CAPABILITY", None)
    for held in ({}, {"ATEN_CPU_CAPABILITY": "default"}):
        subprocess.run([sys.executable, "-c", code], env=environment | held, check=True)


def test_savings_need_a_graph_each() -> None:
    """Steps without attack and a share of the masked patches are situations like others."""
    model = compiled(shallow(build_masked_model(ModelConfig(encoder="nano", patch_size=8), 32)), whole=True)
    config = MimirConfig(decode_ratio=0.5)
    method = Mimir(replace(config, attack=replace(config.attack, every=2, precision="bf16")))
    steps = [lambda step=step: method(model, batch_of(4), seed=0, step=step)["loss"].backward() for step in (1, 2, 3)]
    assert graphs_of(steps) == 2  # the attack in bf16, the training in fp32
