"""The classifier against the authors' names, timm's features, and its own random parts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from file_state import file_state

from mimir_fast.models.blocks import Attention, attend_and_rank, most_attended
from mimir_fast.models.branches import draw_drop_path
from mimir_fast.models.classifier import Classifier, ClassifierConfig, build_classifier
from mimir_fast.ops.patches import patchify

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "state_dicts.json").read_text())
VARIANTS = sorted(name for name in GOLDEN if name.startswith("ft/vit_"))


def small_classifier(seed: int = 0, **options: Any) -> Classifier:
    """ViT-tiny on four patches of 16: all the code, little of the work. Its head is not near zero as a fresh one is."""
    torch.manual_seed(seed)
    model = build_classifier(ClassifierConfig(encoder="tiny", patch_size=16, **options), image_size=32, num_classes=10)
    torch.nn.init.normal_(model.head.weight, std=0.2)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_names_and_shapes_are_the_authors(variant: str) -> None:
    _, encoder, sizes = variant.replace("vit_", "").split("/")
    image_size, rest = sizes.split("p")
    patch_size, num_classes = rest.split("c")
    config = ClassifierConfig(encoder={"ti": "tiny"}.get(encoder, encoder), patch_size=int(patch_size))  # type: ignore[arg-type]
    with torch.device("meta"):
        model = build_classifier(config, int(image_size), int(num_classes))
    assert {name: list(t.shape) for name, t in file_state(model).items()} == dict(GOLDEN[variant])


@pytest.mark.parametrize("global_pool", ["avg", "cls"])
def test_features_and_logits_equal_timm(global_pool: str) -> None:
    timm_vit = pytest.importorskip("timm.models.vision_transformer")
    ours = small_classifier(global_pool=global_pool).eval()
    theirs = timm_vit.VisionTransformer(
        img_size=32, patch_size=16, embed_dim=192, depth=12, num_heads=3, num_classes=10,
        global_pool={"avg": "avg", "cls": "token"}[global_pool],
    ).eval()  # fmt: skip
    theirs.load_state_dict(file_state(ours), strict=True)
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(ours.forward_features(images), theirs.forward_features(images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)


def test_normalisation_lives_inside() -> None:
    plain, normalised = small_classifier(), small_classifier(normalization="imagenet")
    assert set(plain.state_dict()) == set(normalised.state_dict())
    images = torch.rand(2, 3, 32, 32)
    by_hand = (images - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
        :, None, None
    ]
    torch.testing.assert_close(normalised(images), plain(by_hand))


def test_uint8_images_are_scaled() -> None:
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    model = small_classifier()
    torch.testing.assert_close(model(images), model(images.float() / 255))


def test_a_forward_is_deterministic_in_train_mode() -> None:
    model, images = small_classifier(drop_path=0.5).train(), torch.rand(2, 3, 32, 32)
    before = torch.get_rng_state()
    assert torch.equal(model(images), model(images))
    assert torch.equal(before, torch.get_rng_state())


class TestDropPath:
    def test_expectation_and_schedule(self) -> None:
        scales = draw_drop_path(0.3, 12, 2, torch.arange(4000), seed=1, step=2)
        assert scales is not None and scales.shape == (4000, 12, 2)
        torch.testing.assert_close(scales.mean(dim=0), torch.ones(12, 2), rtol=0, atol=0.05)
        dropped = (scales == 0).float().mean(dim=(0, 2))
        torch.testing.assert_close(dropped, torch.linspace(0, 0.3, 12), rtol=0, atol=0.02)

    def test_belongs_to_the_sample(self) -> None:
        whole = draw_drop_path(0.2, 12, 2, torch.arange(16), seed=1, step=2)
        part = draw_drop_path(0.2, 12, 2, torch.arange(8, 16), seed=1, step=2)
        other_step = draw_drop_path(0.2, 12, 2, torch.arange(16), seed=1, step=3)
        assert torch.equal(whole[8:], part) and not torch.equal(whole, other_step)

    def test_a_dropped_block_is_skipped(self) -> None:
        model, images = small_classifier(), torch.rand(2, 3, 32, 32)
        nothing = torch.zeros(2, 12, 2)
        encoder = model.encoder
        patches = encoder.embed(patchify(images, 16), None)
        embedded = torch.cat([encoder.cls_token.expand(2, -1, -1), patches], dim=1) + encoder.pos_embed
        torch.testing.assert_close(model.forward_features(images, nothing), embedded)

    def test_rate_zero_draws_nothing(self) -> None:
        assert draw_drop_path(0.0, 12, 2, torch.arange(4), seed=0, step=0) is None

    def test_the_constant_law_is_that_of_timms_cait_and_xcit(self) -> None:
        scales = draw_drop_path(0.3, 12, 2, torch.arange(4000), seed=1, step=2, law="constant")
        assert scales is not None
        assert scales[:, :, 0].eq(0).float().mean(dim=0).numpy() == pytest.approx(0.3, abs=0.03)
        assert scales.unique().tolist() == pytest.approx([0, 1 / 0.7])


class TestGradientGates:
    def test_values_stay_and_gradients_stop(self) -> None:
        model = small_classifier()
        images = torch.rand(2, 3, 32, 32, requires_grad=True)
        gates = torch.ones(2, 12, 2, dtype=torch.bool)
        gates[1] = False  # the second image's gradient may only use the skip connections
        gated, plain = model(images, None, gates), model(images)
        torch.testing.assert_close(gated, plain, rtol=1e-4, atol=1e-5)  # with gates, other kernels may run
        (through,) = torch.autograd.grad(gated.sum(), images, retain_graph=True)
        (full,) = torch.autograd.grad(plain.sum(), images)
        torch.testing.assert_close(through[0], full[0], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(through[1], full[1])
        assert through[1].abs().sum() > 0


class TestTokenDropping:
    """AGAT: the least attended patches are left behind, layer by layer, in train mode only."""

    def test_layers_get_shorter_only_in_training(self) -> None:
        torch.manual_seed(0)
        config = ClassifierConfig(encoder="tiny", patch_size=4, token_keep_rate=0.9)
        model, images = build_classifier(config, 32, 10), torch.rand(1, 3, 32, 32)
        wanted = [64]
        for _ in range(12):
            wanted.append(max(1, round(0.9 * wanted[-1])))
        assert model.train().forward_features(images).shape[1] == 1 + wanted[-1]
        assert model.eval().forward_features(images).shape[1] == 65

    def test_always_drops_in_evaluation_too(self) -> None:
        torch.manual_seed(0)
        model = small_classifier(token_keep_rate=0.5, token_drop="always").eval()
        images = torch.rand(2, 3, 32, 32)
        whole = small_classifier(token_keep_rate=0.5).eval()
        whole.load_state_dict(model.state_dict())
        assert model.forward_features(images).shape[1] < whole.forward_features(images).shape[1]
        assert torch.equal(model(images), model.train()(images))

    def test_a_rate_of_one_changes_nothing(self) -> None:
        model, images = small_classifier(token_keep_rate=1.0), torch.rand(2, 3, 32, 32)
        assert torch.equal(model.train()(images), model.eval()(images))

    def test_open_attention_equals_the_fused_one(self) -> None:
        attn, x = Attention(48, 3), torch.randn(2, 7, 48)
        out, received = attend_and_rank(attn, x)
        torch.testing.assert_close(out, attn(x), rtol=1e-4, atol=1e-5)
        # Every query of every head hands out attention 1.
        torch.testing.assert_close(received.sum(dim=1), torch.full((2,), 3.0 * 7))

    def test_cls_and_the_most_attended_stay_in_order(self) -> None:
        received = torch.tensor([[0.0, 5.0, 1.0, 4.0, 4.0], [9.0, 1.0, 2.0, 3.0, 4.0]])
        assert most_attended(received, 3).tolist() == [[0, 1, 3], [0, 3, 4]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_path": 1.0}, "drop_path=1.0"),
        ({"token_keep_rate": 0.0}, "such as 0.9"),
        ({"encoder": "giant"}, "tiny, small, base, large"),
        ({"normalization": "cifar"}, "none, half, imagenet"),
    ],
)
def test_bad_options_name_the_fix(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassifierConfig(**options)


def test_bad_sizes_name_the_fix() -> None:
    with pytest.raises(ValueError, match="patch sizes that fit: 2, 4"):
        build_classifier(ClassifierConfig(patch_size=5), 32, 10)
    with pytest.raises(ValueError, match="at least 2 classes"):
        build_classifier(ClassifierConfig(patch_size=16), 32, 1)
    with pytest.raises(ValueError, match="64 x 64 pixels for a classifier of 32 x 32"):
        small_classifier()(torch.rand(1, 3, 64, 64))
