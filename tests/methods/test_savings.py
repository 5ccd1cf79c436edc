"""What a step may save: attacks in some steps only, bf16 in the attack, a share of the masked patches predicted."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_models import masked_vit, prepared
from torch.utils.flop_counter import FlopCounterMode

from mimir_fast.attacks.features import FeatureAttackConfig
from mimir_fast.attacks.reconstruction import ReconstructionAttackConfig
from mimir_fast.attacks.training_attack import COMPARED_EVERY
from mimir_fast.checkpoints.reading import checkpoints_of, read_tensors
from mimir_fast.data.batch import Batch
from mimir_fast.methods.adv_mae import AdvMae, AdvMaeConfig
from mimir_fast.methods.aemim import Aemim, AemimConfig
from mimir_fast.methods.mae import Mae, MaeConfig
from mimir_fast.methods.masks import Mask, MaskConfig, check_decode_ratio
from mimir_fast.methods.mimir import Mimir, MimirConfig, apply_preset
from mimir_fast.methods.noise_mae import NoiseMae, NoiseMaeConfig
from mimir_fast.methods.step import MaskedStep
from mimir_fast.models.masked_model import MaskedModel, ModelConfig, View, build_masked_model
from mimir_fast.ops.patches import every_patch, masked_targets, patchify
from mimir_fast.philox import Stream
from mimir_fast.pretrain import config_from
from mimir_fast.training.pretraining import Pretraining, pretrain


@pytest.fixture
def model() -> MaskedModel:
    torch.manual_seed(0)
    return masked_vit()


@pytest.fixture
def batch() -> Batch:
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    zeros = torch.zeros(6, dtype=torch.int64)
    return Batch(images, zeros, torch.arange(100, 106), zeros)


@pytest.mark.parametrize("preset", ["paper", "official"])
def test_steps_without_attack_are_of_noise_or_clean(model: MaskedModel, batch: Batch, preset: str) -> None:
    """Bit for bit NoiseMae's (MAE's without a random start), and those with an attack are as ever."""
    config = apply_preset(AdvMaeConfig(), preset)
    seldom = replace(config, attack=replace(config.attack, every=3))

    def visible(step: int, config: AdvMaeConfig) -> torch.Tensor:
        return prepared(AdvMae(config), model, batch, step).visible

    for step in (0, 3):
        assert torch.equal(visible(step, seldom), visible(step, config))
    for step in (1, 2):
        start = replace(config, attack=replace(config.attack, num_steps=0))
        assert torch.equal(visible(step, seldom), visible(step, start))
    if preset == "paper":
        noise, clean = NoiseMae(NoiseMaeConfig(eps=config.attack.eps)), Mae(MaeConfig())
        still = replace(seldom, attack=replace(seldom.attack, random_start=False))
        for ours, theirs in ((seldom, noise), (still, clean)):
            losses = [method(model, batch, seed=0, step=1)["loss"] for method in (AdvMae(ours), theirs)]
            assert torch.equal(*losses)


def test_aemim_too_attacks_in_some_steps_only(batch: Batch) -> None:
    torch.manual_seed(0)
    model = masked_vit()
    model.encoder.add_adapters()
    method = Aemim(AemimConfig(attack=FeatureAttackConfig(every=2)))
    patches = patchify(batch.images, 4)
    for number, moves in ((0, True), (1, False), (2, True)):
        step = prepared(method, model, batch, number)
        clean, start = step.noisy_patches(every_patch(batch.images, 4), 2 / 255)
        assert torch.equal(clean, patches) and torch.equal(step.whole, start) is not moves


def test_an_attack_in_bf16_leaves_the_training_in_fp32(model: MaskedModel, batch: Batch) -> None:
    method = AdvMae(AdvMaeConfig(attack=ReconstructionAttackConfig(precision="bf16", num_steps=2)))
    seen: list[bool] = []
    model.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    out = method(model, batch, seed=0, step=1)
    assert seen == [True, True, False] and out["loss"].dtype == torch.float32 and set(out) == {"loss"}
    exact = AdvMae(AdvMaeConfig(attack=ReconstructionAttackConfig(num_steps=2)))(model, batch, seed=0, step=1)["loss"]
    torch.testing.assert_close(out["loss"], exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize("training", ["fp32", "bf16"])
def test_the_sign_agreement_is_the_share_of_equal_signs(model: MaskedModel, batch: Batch, training: str) -> None:
    """Of the first attack and each thousandth, whatever the training's precision; signs taken by hand."""
    attack = ReconstructionAttackConfig(precision="bf16", alpha=1 / 255, every=2)
    method = AdvMae(AdvMaeConfig(attack=attack))
    assert [s for s in range(3 * COMPARED_EVERY) if attack.compares_in(s)] == [0, 2 * COMPARED_EVERY]
    with torch.autocast("cpu", torch.bfloat16, enabled=training == "bf16"):
        found = method(model, batch, seed=0, step=0)["sign_agreement"]
    step = prepared(method, model, batch, 0)
    target = masked_targets(batch.images, step.mask.masked, 4)
    start = step.noisy_patches(step.mask.keep, attack.eps)[1].requires_grad_()
    signs = []
    for bf16 in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            prediction = model(View(start, *step.mask)).prediction
        error = (prediction.float() - target).square().sum()
        signs.append(torch.autograd.grad(error, start)[0].sign())
    wanted = (signs[0] == signs[1]).float().mean()
    assert 0.9 < wanted <= 1
    # A number at the edge of [0, 1] may not move whatever its sign is.
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.01)


def decoded_by_hand(model: MaskedModel, view: View) -> torch.Tensor:
    """cls and visible tokens in their places, mask tokens in the wanted ones, nothing else."""
    decoder, latent = model.decoder, model.encode(view)
    x = decoder.decoder_embed(latent)
    cls, positions = x[:, :1] + decoder.decoder_pos_embed[:, :1], decoder.decoder_pos_embed[0, 1:]
    x = torch.cat([cls, x[:, 1:] + positions[view.keep], decoder.mask_token + positions[view.masked]], dim=1)
    for block in decoder.decoder_blocks:
        x = block(x)
    return decoder.decoder_pred(decoder.decoder_norm(x[:, 1 + view.keep.shape[1] :]))


def test_a_part_of_the_masked_patches_is_decoded_as_if_there_were_no_others(model: MaskedModel, batch: Batch) -> None:
    step = prepared(Mae(MaeConfig(decode_ratio=0.25)), model, batch, 4)
    assert step.mask.masked.shape == (6, 3)  # of 12
    view = View(step.visible, *step.mask)
    torch.testing.assert_close(model(view).prediction, decoded_by_hand(model, view), rtol=1e-4, atol=1e-5)

    def flops(masked: torch.Tensor) -> int:
        with FlopCounterMode(display=False) as counter:
            model.decoder(latent, view.keep, masked)
        return int(counter.get_total_flops())

    latent, everywhere = model.encode(view), prepared(Mae(MaeConfig()), model, batch, 4).mask.masked
    assert flops(view.masked) < 0.5 * flops(everywhere)


def test_the_share_belongs_to_the_sample_and_changes_with_the_step(model: MaskedModel, batch: Batch) -> None:
    """Half a batch has half of the draws; over many samples each masked patch is as likely as any other."""

    def masks(batch: Batch, number: int, ratio: float = 0.5) -> list[Mask]:
        step = MaskedStep(model, batch, seed=3, number=number)
        return [step.draw_mask(MaskConfig(decode_ratio=ratio), s) for s in (Stream.MASK, Stream.ATTACK_MASK)]

    for whole, half, full in zip(masks(batch, 7), masks(batch.first(3), 7), masks(batch, 7, 1.0), strict=True):
        assert torch.equal(whole.masked[:3], half.masked) and torch.equal(whole.keep, full.keep)
        assert all(set(a.tolist()) < set(b.tolist()) for a, b in zip(whole.masked, full.masked, strict=True))
    assert not torch.equal(masks(batch, 8)[0].masked, masks(batch, 7)[0].masked)
    many = Batch(batch.images[:1].expand(4000, -1, -1, -1), *[torch.arange(4000)] * 3)
    counts = masks(many, 0)[0].masked.flatten().bincount(minlength=16)
    assert (counts.float() / counts.sum() - 1 / 16).abs().max() < 0.006


@pytest.mark.parametrize("method", ["mae", "adv_mae", "mimir", "aemim", "single_stage"])
def test_a_share_trains_everything_by_every_method(method: str, batch: Batch) -> None:
    line = ["--recipe", "digits/mimir_vit_nano", "--method", method, "--decode_ratio", "0.3"]
    task = Pretraining(config_from(line))
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    zeros = torch.zeros(4, dtype=torch.int64)
    (run,) = task.passes(task.model, [Batch(images, zeros, torch.arange(4), zeros)], seed=0, step=0)
    run()["loss"].backward()
    assert all(p.grad is not None for p in task.model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("family", "takes"), [("cait", True), ("swin", True), ("convit", False), ("xcit", False)])
def test_decoders_that_count_on_the_grid_say_so(family: str, takes: bool) -> None:
    patch_size = 2 if family == "swin" else 8
    model = build_masked_model(ModelConfig(family=family, encoder="nano", patch_size=patch_size), 32)
    assert model.decodes_parts is takes
    if not takes:
        with pytest.raises(ValueError, match="works on the whole grid: use 1, or another"):
            check_decode_ratio(model, 0.5)
    linear = build_masked_model(ModelConfig(encoder="nano", patch_size=8, decoder="linear"), 32)
    with pytest.raises(ValueError, match="LinearDecoder works on the whole grid"):
        check_decode_ratio(linear, 0.5)


def test_a_run_with_all_savings_resumes_to_the_bit(tmp_path: Path) -> None:
    line = [
        "--recipe", "digits/mimir_vit_nano", "--data.limit", "32", "--batch_size", "8", "--max_steps", "4",
        "--decode_ratio", "0.5", "--attack.every", "2", "--attack.precision", "bf16", "--precision", "fp32",
        "--log_every", "1",
    ]  # fmt: skip
    whole = pretrain(config_from([*line, "--output_dir", str(tmp_path / "whole")]))
    parts = [*line, "--output_dir", str(tmp_path / "parts")]
    for _ in range(2):
        pretrain(config_from([*parts, "--stop_after", "2"]))
    wanted, found = (read_tensors(checkpoints_of(run)[-1], "") for run in (whole, tmp_path / "parts"))
    assert set(wanted) == set(found) and all(torch.equal(wanted[name], found[name]) for name in wanted)
    agreement = ["sign_agreement" in text for text in (whole / "metrics.jsonl").read_text().splitlines()]
    assert agreement == [True, False, False, False]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MaeConfig(decode_ratio=0), "decode_ratio=0, wanted more than 0 and at most 1"),
        (lambda: ReconstructionAttackConfig(every=0), "attack.every=0, wanted at least 1"),
        (lambda: FeatureAttackConfig(precision="fp8"), "attack.precision='fp8', wanted one of same, bf16"),
    ],
)
def test_bad_values_name_the_fix(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()


def test_mimir_pays_for_the_same_latent_whatever_is_decoded(model: MaskedModel, batch: Batch) -> None:
    """In a step without attack, the penalty does not change with the share."""
    config = replace(MimirConfig(), attack=replace(MimirConfig().attack, every=2))
    whole, part = (Mimir(replace(config, decode_ratio=r))(model, batch, seed=0, step=1) for r in (1.0, 0.5))
    assert torch.equal(whole["mi"], part["mi"]) and whole["reconstruction"] != part["reconstruction"]
