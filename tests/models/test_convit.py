"""ConViT: positional scores by definition, timm's ConVit on whole images, the authors' files, errors."""

import json
from pathlib import Path

import pytest
import timm.models.convit
import torch
from file_state import file_state
from small_families import draw, make, moved

from mimir_fast.models.classifier import Classifier, ClassifierConfig
from mimir_fast.models.families import build_encoder, find_family, recognise
from mimir_fast.models.families.convit import ConvitEncoder, PositionalAttention, grid_offsets, relative_offsets
from mimir_fast.models.loading import initialize
from mimir_fast.models.masked_model import ModelConfig, View, build_masked_model
from mimir_fast.models.options import option_texts
from mimir_fast.models.weight_files import Weights
from mimir_fast.ops.patches import patchify, patchify_gather

STATES = json.loads((Path(__file__).parents[1] / "golden" / "state_dicts.json").read_text())


def authors_convit(num_classes: int = 0) -> timm.models.convit.ConVit:
    """A small one of timm's, without qkv bias as the authors fine-tune it."""
    torch.manual_seed(1)
    model = timm.models.convit.ConVit(
        img_size=32, patch_size=4, embed_dim=24, depth=4, num_heads=4, local_up_to_layer=3, num_classes=num_classes
    )
    return moved(model).eval()  # type: ignore[return-value]


def test_attention_by_position_is_its_definition() -> None:
    torch.manual_seed(0)
    layer = moved(PositionalAttention(24, 4)).double()
    places = torch.stack([torch.randperm(64)[:9] for _ in range(2)])
    x = torch.randn(2, 9, 24, dtype=torch.double)
    rows, columns = places // 8, places % 8
    dx, dy = (t.unsqueeze(1) - t.unsqueeze(2) for t in (columns, rows))  # of the key (last), seen from the query
    offsets = torch.stack([dx, dy, dx**2 + dy**2], dim=-1).double()
    by_position = layer.pos_proj(offsets).permute(0, 3, 1, 2).softmax(dim=-1)
    q, k = layer.qk(x).view(2, 9, 2, 4, 6).permute(2, 0, 3, 1, 4)
    by_content = (q @ k.transpose(-2, -1) / 6**0.5).softmax(dim=-1)
    gate = layer.gating_param.sigmoid().view(1, -1, 1, 1)
    mixed = ((1 - gate) * by_content + gate * by_position) @ layer.v(x).view(2, 9, 4, 6).transpose(1, 2)
    expected = layer.proj(mixed.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, relative_offsets(places, 8)), expected)


def test_shared_offsets_are_those_of_each_image() -> None:
    layer = moved(PositionalAttention(24, 4)).double()
    x = torch.randn(3, 16, 24, dtype=torch.double)
    each = relative_offsets(torch.arange(16).expand(3, -1), 4)
    torch.testing.assert_close(layer(x, grid_offsets(4, x.device)), layer(x, each))


def test_one_image_is_not_taken_for_shared_offsets() -> None:
    layer = moved(PositionalAttention(24, 4)).double()
    x = torch.randn(2, 9, 24, dtype=torch.double)
    offsets = relative_offsets(torch.stack([torch.randperm(64)[:9] for _ in range(2)]), 8)
    torch.testing.assert_close(layer(x[:1], offsets[:1]), layer(x, offsets)[:1])


def test_starts_like_a_convolution() -> None:
    layer = build_encoder(ModelConfig("convit", "nano", 4).architecture(32)).blocks[0].attn  # type: ignore[index]
    assert torch.equal(layer.v.weight, torch.eye(96))
    theirs = timm.models.convit.GPSA(96, 4)
    theirs.local_init()
    assert torch.equal(layer.pos_proj.weight, theirs.pos_proj.weight)


def test_true_positions_matter_and_official_ones_do_not_know_them() -> None:
    images, keep, _ = draw()
    shown = View(patchify_gather(images, keep, 4), keep)
    for positions, same in (("true", False), ("official", True)):
        encoder = make("convit", positions=positions).eval().encoder
        encoder.pos_embed.data.zero_()  # type: ignore[union-attr, operator]
        tokens = encoder.embed(shown.patches, keep)
        moved_places = encoder.encode(tokens, (keep * 5) % 64)  # another arrangement of the same patches
        assert torch.equal(encoder.encode(tokens, keep), moved_places) is same


def test_official_positions_need_a_square_number() -> None:
    images, keep, _ = draw()
    encoder = make("convit", positions="official").encoder
    ids = keep[:, :15]
    with pytest.raises(ValueError, match=r"15 of 64 form none: use --model.positions true"):
        encoder.encode(encoder.embed(patchify_gather(images, ids, 4), ids), ids)


def test_export_has_timm_s_features() -> None:
    model = make("convit").eval()
    architecture = recognise(file_state(model))
    assert architecture is not None
    exported = find_family("convit").to_timm(file_state(model), architecture)
    theirs = timm.models.convit.ConVit(**exported.arguments).eval()
    theirs.load_state_dict(exported.tensors, strict=True)
    images = draw()[0]
    ours = model.encoder.encode(model.encoder.embed(patchify(images, 4), None), None)
    torch.testing.assert_close(ours, theirs.forward_features(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_classifier_from_timm_and_back(qkv_bias: bool) -> None:
    """A model that has qkv biases takes weights that have none: the biases are zero."""
    theirs = authors_convit(num_classes=10)
    config = ClassifierConfig("convit", "nano", 4, global_pool="cls", options=(f"qkv_bias={str(qkv_bias).lower()}",))
    ours = Classifier(config, 32, 10).eval()
    report = initialize(ours, Weights(dict(theirs.state_dict()), "timm:small"))
    images = draw()[0]
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)
    assert any("zero" in note for note in report.notes) is qkv_bias
    architecture = recognise(file_state(ours))
    assert architecture is not None
    exported = find_family("convit").to_timm(file_state(ours), architecture)
    again = timm.models.convit.ConVit(**exported.arguments).eval()
    again.load_state_dict(exported.tensors, strict=True)
    torch.testing.assert_close(again(images), theirs(images), rtol=1e-4, atol=1e-5)


def test_norm_after_the_mean_is_not_exported() -> None:
    model = Classifier(ClassifierConfig("convit", "nano", 4, global_pool="avg"), 32, 10)
    architecture = recognise(file_state(model))
    assert architecture is not None
    with pytest.raises(ValueError, match=r"--model.global_pool cls"):
        find_family("convit").to_timm(file_state(model), architecture)


@pytest.mark.parametrize("variant", [name for name in STATES if name.startswith("pre/mae_convit")])
def test_pretrained_names_are_the_authors(variant: str) -> None:
    _, name, sizes = variant.split("/")
    size = {"ti": "tiny"}.get(name.rpartition("_")[2], name.rpartition("_")[2])
    image, patch = map(int, sizes.split("p"))
    with torch.device("meta"):
        state = file_state(build_masked_model(ModelConfig("convit", size, patch), image))
    assert {name: list(t.shape) for name, t in state.items()} == dict(STATES[variant])


def test_finetuned_names_are_the_authors() -> None:
    theirs = dict(STATES["ft/convit_small/224p16c1000"])
    with torch.device("meta"):
        architecture = recognise({name: torch.empty(shape) for name, shape in theirs.items()})
        assert architecture is not None and architecture.size == "small"
        options = option_texts(architecture.options)
        model = Classifier(ClassifierConfig("convit", architecture.size, global_pool="cls", options=options), 224, 1000)
    assert {name: list(t.shape) for name, t in file_state(model).items()} == theirs


@pytest.mark.parametrize("layers", [4, -1])
def test_cls_must_join_somewhere(layers: int) -> None:
    with pytest.raises(ValueError, match="choose 0 to 3"):
        ConvitEncoder(24, 4, 4, layers, image_size=16, patch_size=4)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="width 24 is not divisible by 5 heads"):
        ConvitEncoder(24, 4, 5, 2, image_size=16, patch_size=4)
