"""The gradient-masking checks must cry on models known to mask gradients, and be silent on honest ones."""

import pytest
import torch
from small_classifier import EPS
from torch import Tensor, nn

from mimir_fast.evaluation import masking_checks as checks
from mimir_fast.evaluation.accuracy import measure
from mimir_fast.evaluation.images import EvaluationImages
from mimir_fast.evaluation.named_attacks import make_fgsm, make_pgd, make_random_noise, make_square, natural

CPU = torch.device("cpu")


class Quantized(nn.Module):
    """Rounds its input to a few grey levels: the gradient is zero everywhere, the model no more robust than before."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return self.net((images * 4).round() / 4)


class Saturated(nn.Module):
    """Logits times 1000: the softmax saturates and the cross entropy's gradient underflows to zero."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return 1000 * self.net(images)


def verdicts(model: nn.Module, images: EvaluationImages) -> dict[str, checks.Verdict]:
    def of(attack) -> dict[str, Tensor]:
        record = measure(model, images, attack.run, batch_size=100, device=CPU)
        return {name: record.tensor(name) for name in ("correct", "loss")}

    fgsm, pgd, noise = of(make_fgsm(EPS)), of(make_pgd(EPS, 20, 0)), of(make_random_noise(EPS, 0))
    found = [
        checks.loss_rises_with_steps({k: of(make_pgd(EPS, k, 0))["loss"] for k in (1, 5, 20)}),
        checks.iterative_beats_one_step(fgsm["correct"], pgd["correct"]),
        checks.black_box_never_beats_white_box(pgd["correct"], of(make_square(EPS, 200, 0))["correct"]),
        checks.unbounded_attack_succeeds({e: of(make_pgd(e, 20, 0))["correct"] for e in (EPS, 0.5, 1.0)}, 0.1),
        checks.gradient_beats_noise(fgsm["loss"], noise["loss"]),
        checks.gradients_exist(checks.zero_gradients(model, images.images.float() / 255, images.labels)),
    ]
    assert of(natural())["correct"].mean() > 0.8, "the model must be good before it is attacked"
    return {verdict.name: verdict for verdict in found}


def test_an_honest_model_passes_all(small_model, digits_images: EvaluationImages) -> None:
    found = verdicts(small_model, digits_images.evenly(100))
    assert [v.sentence for v in found.values() if not v.passed] == []


def test_rounding_the_input_is_found_out(small_model, digits_images: EvaluationImages) -> None:
    found = verdicts(Quantized(small_model), digits_images.evenly(100))
    failed = {name for name, verdict in found.items() if not verdict.passed}
    assert {"gradients exist", "black-box never beats white-box", "gradient beats noise"} <= failed
    assert "100.0 %" in found["gradients exist"].sentence


def test_saturated_logits_are_found_out(small_model, digits_images: EvaluationImages) -> None:
    found = verdicts(Saturated(small_model), digits_images.evenly(100))
    assert not found["gradients exist"].passed


@pytest.mark.parametrize(("losses", "passed"), [((1.0, 1.5, 1.49), True), ((1.0, 1.5, 1.2), False)])
def test_loss_may_only_rise(losses: tuple[float, ...], passed: bool) -> None:
    verdict = checks.loss_rises_with_steps({k: torch.tensor([v]) for k, v in enumerate(losses)})
    assert verdict.passed is passed


def test_accuracy_must_reach_zero_and_not_rise() -> None:
    zero, half = torch.zeros(200), torch.cat([torch.ones(100), torch.zeros(100)])
    assert checks.unbounded_attack_succeeds({0.1: half, 1.0: zero}, 0.1).passed
    assert not checks.unbounded_attack_succeeds({0.1: half, 1.0: half}, 0.1).passed
    rising = checks.unbounded_attack_succeeds({0.1: zero, 0.2: half, 1.0: zero}, 0.1)
    assert not rising.passed and "RISES" in rising.sentence
    missed = torch.cat([torch.ones(6), torch.zeros(194)])  # broken at 0.5, so no sign of a hidden gradient at 1
    assert checks.unbounded_attack_succeeds({0.1: half, 0.5: zero, 1.0: missed}, 0.1).passed
