"""AEMIM: two streams, two domains, one encoder; its attack and what each part of the loss reaches."""

import pytest
import torch
import torch.nn.functional as F
from small_models import masked_vit, prepared

from mimir_fast.attacks.features import FeatureAttackConfig, feature_distance
from mimir_fast.data.batch import Batch
from mimir_fast.layers.norms import is_adapter
from mimir_fast.methods.aemim import Aemim, AemimConfig
from mimir_fast.methods.mae import Mae, MaeConfig
from mimir_fast.models.file_names import parameters_by_file_name
from mimir_fast.models.masked_model import MaskedModel, View
from mimir_fast.ops.patches import every_patch, gather_patches, normalize_patches, patchify

EPS = 2 / 255


@pytest.fixture
def model() -> MaskedModel:
    torch.manual_seed(0)
    model = masked_vit()
    model.encoder.add_adapters()
    return model


@pytest.fixture
def batch() -> Batch:
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    zeros = torch.zeros(6, dtype=torch.int64)
    return Batch(images, zeros, torch.arange(100, 106), zeros)


def test_both_domains_start_equal_and_come_apart(model: MaskedModel, batch: Batch) -> None:
    keep = torch.arange(4).expand(6, 4)
    patches = gather_patches(patchify(batch.images, 4), keep)
    clean, adversarial = model(View(patches, keep, domain=0)), model(View(patches, keep, domain=1))
    assert torch.equal(clean.latent, adversarial.latent)
    with torch.no_grad():
        model.encoder.norm.weight_adversarial.mul_(2)
    assert not torch.equal(model(View(patches, keep, domain=1)).latent, adversarial.latent)
    assert torch.equal(model(View(patches, keep, domain=0)).latent, clean.latent)


@pytest.mark.parametrize("distance", ["l2", "kl"])
def test_the_attack_moves_the_features_and_stays_in_its_ball(model: MaskedModel, batch: Batch, distance: str) -> None:
    """More than the random start, more with more steps; masked patches keep their start."""
    reached = []
    for num_steps in (0, 1, 4):
        attack = FeatureAttackConfig(num_steps=num_steps, distance=distance)
        method = Aemim(AemimConfig(attack=attack))
        step = prepared(method, model, batch, 3)
        patches, (keep, masked) = patchify(batch.images, 4), step.mask
        assert (step.whole - patches).abs().max() <= EPS + 1e-7
        assert step.whole.min() >= 0 and step.whole.max() <= 1
        _, start = step.noisy_patches(every_patch(batch.images, 4), EPS)
        assert torch.equal(gather_patches(step.whole, masked), gather_patches(start, masked))
        clean = model(View(gather_patches(patches, keep), keep), decode=False)
        features = model(View(step.visible, keep, domain=1), decode=False)
        reached.append(feature_distance(features, clean, distance).sum().item())
    assert reached[0] < reached[1] < reached[2]


def test_distances_are_the_formulas() -> None:
    a, b = torch.randn(3, 5, 7), torch.randn(3, 5, 7)
    torch.testing.assert_close(feature_distance(a, b, "l2"), ((a - b) ** 2).flatten(1).sum(1))
    p, q = b.double().softmax(-1), a.double().softmax(-1)
    wanted = (p * (p / q).log()).flatten(1).sum(1)
    torch.testing.assert_close(feature_distance(a, b, "kl").double(), wanted, rtol=1e-5, atol=1e-6)


def test_the_loss_is_two_reconstructions(model: MaskedModel, batch: Batch) -> None:
    """The clean part is MAE's own loss; the adversarial part has the adversarial image as its target."""
    method = Aemim(AemimConfig(adversarial_weight=0.5))
    out = method(model, batch, seed=0, step=0)
    torch.testing.assert_close(out["reconstruction"], Mae(MaeConfig())(model, batch, seed=0, step=0)["loss"].detach())
    torch.testing.assert_close(out["loss"].detach(), out["reconstruction"] + 0.5 * out["adversarial"])
    step = prepared(method, model, batch)
    target = gather_patches(step.whole, step.mask.masked)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    prediction = model(View(step.visible, *step.mask, 1)).prediction
    torch.testing.assert_close(out["adversarial"], (prediction - target).square().mean().detach(), rtol=1e-4, atol=1e-5)


def test_each_domain_trains_its_own_adapters(model: MaskedModel, batch: Batch) -> None:
    """All parameters get a gradient from the whole, adapters none without the adversarial part."""
    Aemim(AemimConfig())(model, batch, seed=0, step=0)["loss"].backward()
    without = [n for n, p in parameters_by_file_name(model) if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not without
    model.zero_grad()
    Aemim(AemimConfig(adversarial_weight=0.0))(model, batch, seed=0, step=0)["loss"].backward()
    for name, parameter in parameters_by_file_name(model):
        if is_adapter(name):
            assert not parameter.grad.any(), name


def test_the_attack_leaves_no_trace(model: MaskedModel, batch: Batch) -> None:
    generator = torch.get_rng_state()
    prepared(Aemim(AemimConfig()), model, batch)
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), generator) and model.training


def test_on_simmim(batch: Batch) -> None:
    """The same method on a full-length encoder with a linear head."""
    from mimir_fast.models.masked_model import ModelConfig, build_masked_model

    model = build_masked_model(ModelConfig(encoder="nano", patch_size=4, decoder="linear", adapters=True), 16)
    config = AemimConfig(mask_ratio=0.6, norm_pix_loss=False, mask_unit=8, pixel_loss="l1")
    out = Aemim(config)(model, batch, seed=0, step=0)
    out["loss"].backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_preview_shows_both_streams(model: MaskedModel, batch: Batch) -> None:
    rows = Aemim(AemimConfig()).preview(model, batch, seed=0, step=0)
    assert list(rows) == ["input", "visible", "reconstruction", "adversarial", "adv. reconstr."]
    assert all(row.shape == (6, 3, 16, 16) for row in rows.values())
    assert (rows["adversarial"] - rows["input"]).abs().max() <= EPS + 1e-6


def test_without_attack_and_noise_the_adversarial_image_is_the_clean_one(model: MaskedModel, batch: Batch) -> None:
    step = prepared(Aemim(AemimConfig(attack=FeatureAttackConfig(num_steps=0, random_start=False))), model, batch)
    assert torch.equal(step.whole, patchify(batch.images, 4))


def test_bad_values_name_the_fix(model: MaskedModel, batch: Batch) -> None:
    with pytest.raises(ValueError, match="at the clean image the distance has no gradient"):
        FeatureAttackConfig(random_start=False)
    with pytest.raises(ValueError, match="wanted one of l2, kl"):
        FeatureAttackConfig(distance="cosine")
    with pytest.raises(ValueError, match="adversarial_weight=nan, wanted at least 0"):
        AemimConfig(adversarial_weight=float("nan"))
    with pytest.raises(ValueError, match="no adapters"):
        Aemim(AemimConfig())(masked_vit(), batch, seed=0, step=0)


def test_one_pass_of_the_decoder_serves_both_streams(model: MaskedModel, batch: Batch) -> None:
    """Loss and every gradient are those of two whole forward passes."""
    method = Aemim(AemimConfig(adversarial_weight=0.5))
    found = method(model, batch, seed=0, step=0)["loss"]
    grads = torch.autograd.grad(found, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    step, patches, errors = prepared(method, model, batch), patchify(batch.images, 4), []
    mask = step.mask
    for domain, whole in enumerate((patches, step.whole)):
        output = model(View(gather_patches(whole, mask.keep), *mask, domain))
        target = normalize_patches(gather_patches(whole, mask.masked))
        errors.append(F.mse_loss(output.prediction, target))
    wanted = errors[0] + 0.5 * errors[1]
    torch.testing.assert_close(found, wanted)
    separate = torch.autograd.grad(wanted, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    for one, other in zip(grads, separate, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
