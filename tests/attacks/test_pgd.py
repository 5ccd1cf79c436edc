"""PGD, FGSM and FastAT: equal to torchattacks', inside the ball to the last bit, and without a trace."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_classifier import EPS, SmallNet
from torch import Tensor, nn

from mimir_fast.attacks.pgd import PGD, fast_threat, fgsm, image_bounds, linf_ascent, pgd, random_start
from mimir_fast.attacks.threat_model import LinfThreat
from mimir_fast.evaluation.images import EvaluationImages


@pytest.fixture(scope="module")
def digits(digits_images: EvaluationImages) -> tuple[Tensor, Tensor]:
    return digits_images.images.float() / 255, digits_images.labels


def right(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    with torch.no_grad():
        return int((model(images).argmax(1) == labels).sum())


@pytest.mark.parametrize("num_steps", [1, 20, 100])
def test_equals_torchattacks_without_random_start(small_model: nn.Module, digits, num_steps: int) -> None:
    torchattacks = pytest.importorskip("torchattacks")
    images, labels = digits
    alpha = EPS / 4 if num_steps > 1 else EPS
    options = {"eps": EPS, "alpha": alpha, "steps": num_steps, "random_start": False}
    theirs = torchattacks.PGD(small_model, **options)(images, labels)
    ours = pgd(small_model, images, labels, LinfThreat(EPS, alpha, num_steps, random_start=False), mode="eval")
    assert torch.equal(PGD(small_model, **options)(images, labels), ours)
    # The same algorithm: only where a gradient is zero up to rounding may a sign, and then a pixel, differ.
    assert ((ours - theirs).abs() > 1e-5).float().mean() < 2e-3
    assert abs(right(small_model, ours, labels) - right(small_model, theirs, labels)) <= 1


def test_an_attack_as_an_object(small_model: nn.Module, digits) -> None:
    """Each call starts elsewhere, as each call of torchattacks does; another object of the seed repeats them."""
    images, labels = (part[:8] for part in digits)
    attack, again = PGD(small_model, steps=2), PGD(small_model, steps=2)
    calls = [attack(images, labels) for _ in range(2)]
    assert not torch.equal(*calls)
    assert all(torch.equal(call, again(images, labels)) for call in calls)
    assert not torch.equal(PGD(small_model, steps=2, seed=1)(images, labels), calls[0])
    assert "eps=0.031" in repr(attack) and "num_steps=2" in repr(attack)
    with pytest.raises(ValueError, match="type 8/255"):
        PGD(small_model, eps=8)
    assert PGD(small_model, eps="8/255", alpha="2/255").threat == PGD(small_model).threat
    for wrong in ("8/", None, float("inf")):
        with pytest.raises(ValueError, match=r"^eps=.*wanted"):
            PGD(small_model, eps=wrong)
    with pytest.raises(TypeError, match=r"images must be a torch\.Tensor, got numpy\.ndarray"):
        attack(images.numpy(), labels)


def test_random_starts_agree_with_torchattacks_within_their_noise(small_model: nn.Module, digits) -> None:
    torchattacks = pytest.importorskip("torchattacks")
    images, labels = digits
    theirs = []
    with torch.random.fork_rng([]):
        for seed in range(4):
            torch.manual_seed(seed)
            theirs.append(right(small_model, torchattacks.PGD(small_model, EPS, EPS / 4, 20)(images, labels), labels))
    threat = LinfThreat(EPS, EPS / 4, 20)
    ours = [right(small_model, pgd(small_model, images, labels, threat, seed=seed), labels) for seed in range(4)]
    assert min(ours) > 30 and max(ours) < 270, "the test needs a robust accuracy in between"
    assert abs(sum(ours) - sum(theirs)) / 4 <= 4  # of 300 images


def test_fgsm_equals_torchattacks(small_model: nn.Module, digits) -> None:
    FGSM = pytest.importorskip("torchattacks").FGSM
    images, labels = digits
    difference = fgsm(small_model, images, labels, EPS) - FGSM(small_model, eps=EPS)(images, labels)
    assert (difference.abs() > 1e-6).float().mean() < 1e-3


def test_fast_is_one_step_of_one_and_a_quarter_eps(small_model: nn.Module, digits) -> None:
    threat = fast_threat(8 / 255)
    assert (threat.num_steps, threat.random_start) == (1, True)
    assert threat.alpha == pytest.approx(10 / 255)


@settings(max_examples=60, deadline=None)
@given(
    pixels=st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4),
    eps=st.one_of(st.sampled_from([0.0, 2 / 255, 8 / 255, 1.0]), st.floats(0, 1)),
    alpha=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_ball_and_range_hold_to_the_last_bit(pixels: list[float], eps: float, alpha: float, seed: int) -> None:
    """In exact arithmetic: |x_adv − x| ≤ ε and 0 ≤ x_adv ≤ 1."""
    images = torch.tensor(pixels).view(1, 1, 2, 2)
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(1, 1, 2, 2, generator=generator)
    threat = LinfThreat(eps, alpha, 3)
    start = random_start(images, eps, seed=seed)
    adversarial = linf_ascent(lambda x: (x * direction).sum((1, 2, 3)), images, start, threat)
    for before, after in zip(images.flatten().tolist(), adversarial.flatten().tolist(), strict=True):
        assert abs(Fraction(after) - Fraction(before)) <= Fraction(eps)
        assert 0 <= after <= 1


def test_ball_bounds_are_the_widest_ones() -> None:
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    eps = 8 / 255
    _, high = image_bounds(images, eps)
    beyond = torch.nextafter(high, torch.tensor(2.0))
    assert ((beyond.double() - images.double() > eps) | (high == 1)).all()


def test_start_belongs_to_the_image_not_to_the_batch(small_model: nn.Module, digits) -> None:
    """The same image is attacked the same way in any batch, at any place, on any rank."""
    images, labels = digits[0][:12], digits[1][:12]
    samples, threat = torch.arange(100, 112), LinfThreat(EPS, EPS / 4, 3)
    whole = pgd(small_model, images, labels, threat, samples=samples, seed=3, step=5)
    order = torch.tensor([7, 2, 11])
    part = pgd(small_model, images[order], labels[order], threat, samples=samples[order], seed=3, step=5)
    torch.testing.assert_close(part, whole[order], rtol=0, atol=1e-6)
    other = pgd(small_model, images, labels, threat, samples=samples, seed=3, step=6)
    assert not torch.equal(other, whole)


class Noisy(SmallNet):
    """With dropout, so that a forward pass in train mode changes all it can."""

    def forward_features(self, images: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward_features(images), 0.3, self.training)


@pytest.mark.parametrize("mode", ["eval", "train", "as_is"])
def test_attack_leaves_no_trace(digits, mode) -> None:
    images, labels = digits[0][:8], digits[1][:8]
    model = Noisy().train()
    model.body[1].eval()  # a frozen BatchNorm inside a model in train mode
    model.head.weight.requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.5) if p.requires_grad else None
    before = {name: t.clone() for name, t in model.state_dict().items()}
    flags = [m.training for m in model.modules()]
    tracking = [m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    random_state = torch.get_rng_state()

    pgd(model, images, labels, LinfThreat(EPS, EPS / 4, 3), mode=mode)

    assert torch.equal(torch.get_rng_state(), random_state)
    assert [m.training for m in model.modules()] == flags
    assert [m.track_running_stats for m in model.modules() if isinstance(m, nn.BatchNorm2d)] == tracking
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all((p.grad == 0.5).all() for p in model.parameters() if p.requires_grad)
    assert not model.head.weight.requires_grad and model.head.weight.grad is None


def test_train_mode_uses_the_batch_statistics(digits) -> None:
    images, labels = digits[0][:16], digits[1][:16]
    model, threat = SmallNet().train(), LinfThreat(EPS, EPS / 4, 3)
    in_train = pgd(model, images, labels, threat, mode="train")
    assert torch.equal(in_train, pgd(model, images, labels, threat, mode="as_is"))
    assert not torch.equal(in_train, pgd(model, images, labels, threat, mode="eval"))


def test_soft_labels_and_own_losses(small_model: nn.Module, digits) -> None:
    """One-hot probabilities mean what the class means; a loss of one's own is maximised instead."""
    images, labels = digits[0][:8], digits[1][:8]
    threat = LinfThreat(EPS, EPS / 4, 4)
    hard = pgd(small_model, images, labels, threat)
    soft = pgd(small_model, images, nn.functional.one_hot(labels, 10).float(), threat)
    torch.testing.assert_close(soft, hard, rtol=0, atol=1e-6)
    toward_zero = pgd(small_model, images, labels, threat, loss=lambda logits, _: logits[:, 0])
    with torch.no_grad():
        assert (small_model(toward_zero)[:, 0] > small_model(images)[:, 0]).all()


def test_summed_loss_does_not_underflow_in_half_precision() -> None:
    """A confident model's gradients are tiny; divided by the batch they would vanish in bf16/fp16 arithmetic."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 10)).half()
    images, labels = torch.rand(64, 1, 4, 4).half(), torch.zeros(64, dtype=torch.long)
    adversarial = pgd(model, images, labels, LinfThreat(8 / 255, 2 / 255, 2, random_start=False))
    assert adversarial.dtype == torch.float16
    assert (adversarial != images).float().mean() > 0.9


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "float"),
        (torch.full((2, 1, 8, 8), 3.0), "normalise"),
        (torch.full((2, 1, 8, 8), float("nan")), "normalise"),
        (torch.zeros(1, 8, 8), "B, C, H, W"),
    ],
)
def test_refuses_images_that_are_not_in_the_unit_range(small_model: nn.Module, images: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pgd(small_model, images, torch.zeros(len(images), dtype=torch.long), LinfThreat())


def test_refuses_eps_in_grey_levels_and_unknown_modes(small_model: nn.Module, digits) -> None:
    with pytest.raises(ValueError, match="8/255"):
        LinfThreat(eps=8)
    with pytest.raises(ValueError, match="as_is"):
        pgd(small_model, digits[0][:1], digits[1][:1], LinfThreat(), mode="evaluation")  # type: ignore[arg-type]
