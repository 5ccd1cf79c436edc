"""mae, adv_mae and mimir: what the attack may touch, what it achieves, what the penalty adds."""

from dataclasses import replace

import pytest
import torch
from small_models import masked_vit, prepared

from mimir_fast.attacks.reconstruction import ReconstructionAttackConfig
from mimir_fast.data.batch import Batch
from mimir_fast.methods.adv_mae import AdvMae, AdvMaeConfig
from mimir_fast.methods.mae import Mae, MaeConfig
from mimir_fast.methods.mimir import Mimir, MimirConfig, apply_preset
from mimir_fast.methods.mutual_information import MutualInformationConfig
from mimir_fast.methods.noise_mae import NoiseMae, NoiseMaeConfig
from mimir_fast.models.masked_model import MaskedModel, ModelConfig, View, build_masked_model
from mimir_fast.ops.hsic import hsic
from mimir_fast.ops.masked_loss import Kind
from mimir_fast.ops.patches import gather_patches, patchify, patchify_gather
from mimir_fast.philox import Stream

EPS = 8 / 255
AXES = [("shared", "clean"), ("shared", "adversarial"), ("fresh", "clean"), ("fresh", "adversarial")]


@pytest.fixture
def model() -> MaskedModel:
    torch.manual_seed(0)
    return masked_vit(16, 4, 3, 32, 2, 2, 16, 2, 2)


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return Batch(images, torch.zeros(8, dtype=torch.int64), torch.arange(100, 108), torch.zeros(8, dtype=torch.int64))


def part(batch: Batch, rows: slice) -> Batch:
    return Batch(batch.images[rows], batch.labels[rows], batch.samples[rows], batch.epochs[rows])


@pytest.mark.parametrize(("mask", "target"), AXES)
def test_the_ball_and_the_range_hold(model: MaskedModel, batch: Batch, mask: str, target: str) -> None:
    method = AdvMae(AdvMaeConfig(attack=ReconstructionAttackConfig(eps=EPS, num_steps=3, mask=mask, target=target)))
    step = prepared(method, model, batch, number=5)
    clean = patchify_gather(batch.images, step.mask.keep, 4)
    assert (step.visible - clean).abs().max() <= EPS + 1e-7
    assert step.visible.min() >= 0 and step.visible.max() <= 1
    assert (step.whole is None) == ((mask, target) == ("shared", "clean"))


def test_a_masked_patch_moves_only_when_the_target_does(model: MaskedModel, batch: Batch) -> None:
    """With a clean target no gradient reaches what the attack's mask hides; with an adversarial one it does."""
    for target, moves in (("clean", False), ("adversarial", True)):
        attack = ReconstructionAttackConfig(mask="fresh", target=target, random_start=False)
        method = AdvMae(AdvMaeConfig(attack=attack))
        step = prepared(method, model, batch)
        change = (step.whole - patchify(batch.images, 4)).abs()
        attack_mask = step.draw_mask(method.config, Stream.ATTACK_MASK)
        hidden = change.gather(1, attack_mask.masked.unsqueeze(-1).expand(-1, -1, 48))
        assert bool((hidden > 0).any()) == moves


def test_the_attack_raises_the_loss(model: MaskedModel, batch: Batch) -> None:
    """More with more steps, and more than the random start alone."""

    def loss(num_steps: int) -> float:
        attack = ReconstructionAttackConfig(eps=EPS, alpha=2 / 255, num_steps=num_steps)
        out = AdvMae(AdvMaeConfig(attack=attack))(model, batch, seed=0, step=0)
        return out["loss"].item()

    assert loss(0) < loss(1) < loss(8)


@pytest.mark.parametrize("target", ["clean", "adversarial"])
@pytest.mark.parametrize("kind", ["l2", "l1"])
def test_the_attack_maximises_the_error_that_training_minimises(
    model: MaskedModel, batch: Batch, target: str, kind: Kind
) -> None:
    attack = ReconstructionAttackConfig(target=target, random_start=False, alpha=1 / 255)
    method = AdvMae(AdvMaeConfig(attack=attack, pixel_loss=kind, norm_pix_loss=False))
    step = prepared(method, model, batch)
    clean = patchify(batch.images, 4).requires_grad_()
    prediction = model(View(gather_patches(clean, step.mask.keep), *step.mask)).prediction
    truth = gather_patches(clean if target == "adversarial" else clean.detach(), step.mask.masked)
    difference = prediction - truth
    (grad,) = torch.autograd.grad((difference.square() if kind == "l2" else difference.abs()).sum(), clean)
    grad, clean = gather_patches(grad, step.mask.keep), gather_patches(clean.detach(), step.mask.keep)
    sure = (grad.abs() > 1e-6) & (clean > 0.01) & (clean < 0.99)
    assert sure.float().mean() > 0.5
    assert torch.equal((step.visible - clean).sign()[sure], grad.sign()[sure])


@pytest.mark.parametrize("family", ["vit", "swin", "convnext"])
def test_pooled_tokens_are_those_of_all_visible_patches(family: str, batch: Batch) -> None:
    """Swin and ConvNeXt have no cls row to leave out: the first visible unit counts, also where it is the only one."""
    torch.manual_seed(0)
    config = ModelConfig(family=family, encoder="nano", patch_size=2 if family != "vit" else 8)
    model = build_masked_model(config, 32)
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    batch = Batch(images, *[torch.arange(6)] * 3)
    grid = model.encoder.num_patches
    method = Mimir(MimirConfig(mask_ratio=1 - 1 / grid, mi=MutualInformationConfig(tokens="pooled", weight=1.0)))
    step = prepared(method, model, batch)
    method.forward(step)
    patches = step.latent[:, model.encoder.num_prefix :]
    assert patches.shape[1] == 1
    expected = hsic(method.image_side(step).flatten(1), patches.mean(1), sigma=5.0)
    torch.testing.assert_close(method.losses(step)["mi"][1], expected)


@pytest.mark.parametrize(("mask", "target"), AXES)
def test_an_attack_leaves_no_trace(model: MaskedModel, batch: Batch, mask: str, target: str) -> None:
    method = AdvMae(AdvMaeConfig(attack=ReconstructionAttackConfig(mask=mask, target=target)))
    model.encoder.norm.weight.grad = torch.ones_like(model.encoder.norm.weight)
    needs = [p.requires_grad for p in model.parameters()]
    generator = torch.get_rng_state()
    prepared(method, model, batch)
    assert torch.equal(model.encoder.norm.weight.grad, torch.ones_like(model.encoder.norm.weight))
    assert sum(p.grad is not None for p in model.parameters()) == 1
    assert [p.requires_grad for p in model.parameters()] == needs
    assert torch.equal(torch.get_rng_state(), generator) and model.training


def test_a_compiled_model_is_frozen_meanwhile_and_thawed_after(model: MaskedModel, batch: Batch) -> None:
    """The same attack through torch.compile; without freezing it would compute every weight gradient."""
    method = AdvMae(AdvMaeConfig(attack=ReconstructionAttackConfig()))
    eager = method(model, batch, seed=0, step=0)["loss"]
    needs = [p.requires_grad for p in model.parameters()]
    for block in model.layers():
        block.compile(backend="aot_eager")
    method(model, batch, seed=0, step=0)["loss"].backward()
    model.zero_grad()
    compiled = method(model, batch, seed=0, step=0)["loss"]  # all graphs are there now, none may be mistaken
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)
    compiled.backward()
    assert [p.requires_grad for p in model.parameters()] == needs
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("preset", ["paper", "official"])
def test_draws_belong_to_the_sample_not_to_the_batch(model: MaskedModel, batch: Batch, preset: str) -> None:
    """Half a batch gives half of the draws: what two ranks see is what one sees."""
    config = apply_preset(MimirConfig(), preset)

    def draws(batch: Batch, number: int) -> list[torch.Tensor]:
        step = prepared(Mimir(replace(config, attack=replace(config.attack, num_steps=0))), model, batch, number)
        noise = step.visible - patchify_gather(batch.images, step.mask.keep, 4)
        return [step.mask.keep, step.draw_mask(config, Stream.ATTACK_MASK).keep, noise]

    whole = draws(batch, 7)
    for rows in (slice(0, 4), slice(4, 8)):
        for ours, all_of_them in zip(draws(part(batch, rows), 7), whole, strict=True):
            assert torch.equal(ours, all_of_them[rows])
    assert not any(torch.equal(later, now) for later, now in zip(draws(batch, 8), whole, strict=True))


def test_delta_of_the_paper_starts_everywhere(model: MaskedModel, batch: Batch) -> None:
    """Algorithm 1: δ is random noise in masked patches too, which no gradient moves; only the penalty sees it."""
    paper = apply_preset(MimirConfig(), "paper")
    assert paper.mi.inputs == "noisy"
    plain = replace(paper, mi=replace(paper.mi, inputs="adversarial"))
    sides = []
    for config in (paper, plain):
        method = Mimir(config)
        step = prepared(method, model, batch)
        sides.append(method.image_side(step))
        keep = step.mask.keep.unsqueeze(-1).expand_as(step.visible)
        assert torch.equal(sides[-1].gather(1, keep), step.visible)
    clean = patchify(batch.images, 4)
    masked = torch.ones(sides[0].shape[:2], dtype=torch.bool).scatter_(1, step.mask.keep, False)
    noise, none = ((side - clean)[masked] for side in sides)
    assert not none.any() and noise.abs().max() <= paper.attack.eps + 1e-6 and noise.std() > paper.attack.eps / 3
    still = replace(paper, attack=replace(paper.attack, random_start=False))
    step = prepared(Mimir(still), model, batch)
    assert not (Mimir(still).image_side(step) - clean)[masked].any()


def test_a_fresh_mask_attacks_other_patches_than_are_visible(model: MaskedModel, batch: Batch) -> None:
    """And a shared one those: from the clean image, with the image as target, nothing else moves."""
    for mask in ("shared", "fresh"):
        attack = ReconstructionAttackConfig(mask=mask, random_start=False)
        method = AdvMae(AdvMaeConfig(attack=attack))
        step = prepared(method, model, batch)
        moved = (step.visible != patchify_gather(batch.images, step.mask.keep, 4)).any(dim=2)
        fresh = step.draw_mask(method.config, Stream.ATTACK_MASK).keep
        common = (step.mask.keep[:, :, None] == fresh[:, None]).any(dim=2)
        assert torch.equal(moved, torch.ones_like(moved) if mask == "shared" else common)
        assert 0 < common.sum() < common.numel()


def test_mae_equals_adv_mae_without_perturbation(model: MaskedModel, batch: Batch) -> None:
    mae = Mae(MaeConfig())(model, batch, seed=0, step=0)["loss"]
    still = ReconstructionAttackConfig(eps=0.0, num_steps=0, random_start=False)
    torch.testing.assert_close(AdvMae(AdvMaeConfig(attack=still))(model, batch, seed=0, step=0)["loss"], mae)


def test_mae_loss_is_the_formula(model: MaskedModel, batch: Batch) -> None:
    """Mean over masked patches of the squared error to the per-patch normalised image, written the long way."""
    keep = prepared(Mae(MaeConfig()), model, batch).mask.keep
    images = batch.images.float() / 255
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).reshape(8, 16, 48)
    target = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    prediction = model(View(patches.gather(1, keep.unsqueeze(-1).expand(-1, -1, 48)), keep)).prediction
    error = (prediction - target).square().mean(-1)
    hidden = torch.ones(8, 16).scatter(1, keep, 0)
    wanted = (error * hidden).sum() / hidden.sum()
    torch.testing.assert_close(Mae(MaeConfig())(model, batch, seed=0, step=0)["loss"], wanted)


@pytest.mark.parametrize("estimator", ["hsic", "nhsic", "renyi"])
@pytest.mark.parametrize("tokens", ["sorted", "shuffled", "pooled"])
@pytest.mark.parametrize("inputs", ["adversarial", "clean", "visible"])
def test_every_estimator_takes_every_input(
    model: MaskedModel, batch: Batch, estimator: str, tokens: str, inputs: str
) -> None:
    """The total is reconstruction + λ·MI, and the penalty's gradient reaches the encoder."""
    config = MimirConfig(mi=MutualInformationConfig(estimator=estimator, weight=0.5, inputs=inputs, tokens=tokens))
    out = Mimir(config)(model, batch, seed=0, step=0)
    torch.testing.assert_close(out["loss"].detach(), out["reconstruction"] + 0.5 * out["mi"])
    assert out["mi"].isfinite() and out["mi"] > 0
    out["loss"].backward()
    with_penalty = model.encoder.blocks[0].attn.qkv.weight.grad.clone()
    model.zero_grad()
    weightless = replace(config, mi=replace(config.mi, weight=0.0))
    Mimir(weightless)(model, batch, seed=0, step=0)["loss"].backward()
    assert (with_penalty - model.encoder.blocks[0].attn.qkv.weight.grad).abs().max() > 0


def test_bf16_keeps_its_islands(model: MaskedModel, batch: Batch) -> None:
    """Under autocast the loss and the penalty come out in fp32, close to their fp32 values."""
    method = Mimir(MimirConfig(mi=MutualInformationConfig(estimator="nhsic")))
    exact = method(model, batch, seed=0, step=0)
    with torch.autocast("cpu", torch.bfloat16):
        coarse = method(model, batch, seed=0, step=0)
    assert coarse["loss"].dtype == coarse["mi"].dtype == torch.float32
    torch.testing.assert_close(coarse["reconstruction"], exact["reconstruction"], rtol=2e-2, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReconstructionAttackConfig(eps=8), r"eps=8, .*looks like 8/255"),
        (lambda: MaeConfig(mask_ratio=75), "fraction between 0 and 1"),
        (lambda: MutualInformationConfig(weight=-1), "mi.weight=-1, wanted at least 0"),
        (lambda: MutualInformationConfig(sigma=0), "mi.sigma=0, wanted more than 0"),
        (lambda: MutualInformationConfig(estimator="nhsic", bandwidth="median"), "bandwidth=reference"),
        (lambda: apply_preset(MimirConfig(), "oficial"), "paper or official"),
    ],
)
def test_bad_values_name_the_fix(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()


def test_a_preview_shows_a_perturbation_where_there_is_one(model: MaskedModel, batch: Batch) -> None:
    methods = Mae(MaeConfig()), NoiseMae(NoiseMaeConfig()), AdvMae(AdvMaeConfig())
    for method, change in zip(methods, ("", "noisy", "adversarial"), strict=True):
        rows = method.preview(model, batch, seed=0, step=0)
        changed = [change, "difference"] if change else []
        assert list(rows) == ["input", *changed, "visible", "reconstruction"]
        if change:
            difference = rows[change] - rows["input"]
            assert torch.equal((rows["difference"] > 0.5), difference > 0)
            assert max(rows["difference"].max(), 1 - rows["difference"].min()) == 1, "magnified to full range"


@pytest.mark.parametrize("estimator", ["hsic", "nhsic", "renyi"])
@pytest.mark.parametrize("sizes", [(4, 4), (3, 3, 2), (1, 7)])
def test_the_penalty_of_a_whole_step_does_not_know_of_micro_batches(
    model: MaskedModel, batch: Batch, estimator: str, sizes: tuple[int, ...]
) -> None:
    """Estimated on each micro-batch, its gradient fell (nHSIC) or grew (HSIC, Rényi) with their number."""
    mi = MutualInformationConfig(estimator=estimator, weight=10.0, accumulated=True)
    method = Mimir(MimirConfig(mi=mi))

    def step(*batches: Batch) -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        value = 0.0
        for run, one in zip(method.passes(model, batches, seed=0, step=3), batches, strict=True):
            out = run()
            (out["loss"] * len(one.images) / 8).backward()
            value += out["mi"].item() * len(one.images) / 8
        return value, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    value, gradients = step(*(part(batch, slice(end - size, end)) for size, end in zip(sizes, ends, strict=True)))
    wanted, wanted_gradients = step(batch)
    assert value == pytest.approx(wanted, rel=1e-5)
    torch.testing.assert_close(gradients, wanted_gradients, rtol=1e-4, atol=1e-5)


def test_what_a_run_says_of_the_penaltys_images() -> None:
    def said(micro: int, accum: int, ranks: int, **options: object) -> str:
        return MimirConfig(mi=MutualInformationConfig(**options)).check_batches(micro, accum, ranks)

    assert said(128, 1, 8) == "penalty: 1e-05 times mi, estimated on 128 images"
    assert said(8, 16, 1) == "penalty: 1e-05 times mi, estimated on 8 images (--mi.accumulated: on all of a step)"
    assert said(8, 16, 2, accumulated=True) == "penalty: 1e-05 times mi, estimated on 128 images"
    assert said(8, 16, 2, scope="global", weight=2.0) == (
        "penalty: 2 times mi, estimated on 16 images (--mi.accumulated: on all of a step)"
    )
    assert said(8, 16, 2, accumulated=True, scope="global") == "penalty: 1e-05 times mi, estimated on 256 images"
    assert said(1, 4, 1, estimator="none") == said(1, 4, 1, weight=0.0) == ""
    with pytest.raises(ValueError, match=r"--accum_iter, --mi\.accumulated, or --mi\.scope global"):
        said(1, 4, 1)
