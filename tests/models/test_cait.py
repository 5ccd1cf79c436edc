"""CaiT: timm's Cait on whole images, the authors' files, class attention."""

import json
from pathlib import Path

import pytest
import timm.models.cait
import torch
from file_state import file_state
from small_families import draw, make, moved

from mimir_fast.models.classifier import Classifier, ClassifierConfig
from mimir_fast.models.families import find_family, recognise
from mimir_fast.models.families.cait import CaitBlock, ClassBlock
from mimir_fast.models.loading import initialize
from mimir_fast.models.masked_model import ModelConfig, build_masked_model
from mimir_fast.models.options import option_texts
from mimir_fast.models.weight_files import Weights
from mimir_fast.ops.patches import patchify

STATES = json.loads((Path(__file__).parents[1] / "golden" / "state_dicts.json").read_text())


def test_blocks_are_timm_s() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 9, 24)
    theirs = moved(timm.models.cait.LayerScaleBlock(24, 4, qkv_bias=True, init_values=0.5)).eval()
    ours = CaitBlock(24, 4)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ours.norm1.eps = ours.norm2.eps = 1e-5  # timm's default here; its models pass 1e-6
    torch.testing.assert_close(ours(x), theirs(x))
    for_cls = moved(timm.models.cait.LayerScaleBlockClassAttn(24, 4, qkv_bias=True, init_values=0.5)).eval()
    our_cls = ClassBlock(24, 4)
    our_cls.load_state_dict(for_cls.state_dict(), strict=True)
    our_cls.norm1.eps = our_cls.norm2.eps = 1e-5
    torch.testing.assert_close(our_cls(x[:, 1:], x[:, :1]), for_cls(x[:, 1:], x[:, :1]))


def test_export_has_timm_s_features() -> None:
    model = make("cait").eval()
    architecture = recognise(file_state(model))
    assert architecture is not None
    exported = find_family("cait").to_timm(file_state(model), architecture)
    theirs = timm.models.cait.Cait(**exported.arguments).eval()
    theirs.load_state_dict(exported.tensors, strict=True)
    images = draw()[0]
    ours = model.encoder.encode(model.encoder.embed(patchify(images, 4), None), None)
    torch.testing.assert_close(ours, theirs.forward_features(images), rtol=1e-4, atol=1e-5)


def test_classifier_from_timm() -> None:
    torch.manual_seed(1)
    theirs = timm.models.cait.Cait(
        img_size=32, patch_size=4, embed_dim=96, depth=4, num_heads=4, num_classes=10, init_values=0.1
    )
    moved(theirs).eval()
    ours = Classifier(ClassifierConfig("cait", "nano", 4, global_pool="cls"), 32, 10).eval()
    initialize(ours, Weights(dict(theirs.state_dict()), "timm:small"))
    images = draw()[0]
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)


def test_cls_token_does_not_touch_the_patches() -> None:
    encoder = make("cait").eval().encoder
    tokens = encoder.embed(patchify(draw()[0], 4), None)
    before = encoder.encode(tokens, None)
    encoder.cls_token.data.add_(1)  # type: ignore[union-attr, operator]
    after = encoder.encode(tokens, None)
    assert torch.equal(before[:, 1:], after[:, 1:]) and not torch.allclose(before[:, 0], after[:, 0])


@pytest.mark.parametrize("size", ["xxs24", "s36"])
def test_pretrained_names_are_the_authors(size: str) -> None:
    with torch.device("meta"):
        state = file_state(build_masked_model(ModelConfig("cait", size), 224))
    assert {name: list(t.shape) for name, t in state.items()} == dict(STATES[f"pre/mae_cait_{size}/224p16"])


def test_finetuned_names_are_the_authors() -> None:
    theirs = dict(STATES["ft/cait_xxs24/224p16c1000"])
    with torch.device("meta"):
        architecture = recognise({name: torch.empty(shape) for name, shape in theirs.items()})
        assert architecture is not None and architecture.size == "xxs24"
        options = option_texts(architecture.options)
        model = Classifier(ClassifierConfig("cait", architecture.size, global_pool="cls", options=options), 224, 1000)
    assert {name: list(t.shape) for name, t in file_state(model).items()} == theirs
