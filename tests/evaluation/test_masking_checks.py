"""The gradient-masking checks must cry on models known to mask gradients, and be silent on honest ones."""

import pytest
import torch
from small_classifier import DIGITS, EPS
from torch import Tensor, nn

from mimir_fast.evaluation import statistics
from mimir_fast.evaluation.attacks import make_fgsm, make_pgd, make_random_noise, natural
from mimir_fast.evaluation.config import EvaluateConfig
from mimir_fast.evaluation.images import EvaluationImages
from mimir_fast.evaluation.measure import ShardRun, measure, scored
from mimir_fast.evaluation.topics import masking as checks
from mimir_fast.evaluation.topics.masking import make_apgd, make_square

CPU = torch.device("cpu")
ASKED = EvaluateConfig("a model", data=DIGITS, eps=EPS)


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
        record = measure(scored(attack.run), model, images, ShardRun(100, CPU))
        return {name: record.tensor(name) for name in ("correct", "loss")}

    fgsm, pgd, noise = of(make_fgsm(ASKED)), of(make_pgd(ASKED, 20)), of(make_random_noise(ASKED))
    found = [
        checks.loss_rises_with_steps({k: of(make_pgd(ASKED, k))["loss"] for k in (1, 5, 20)}),
        checks.iterative_beats_one_step(fgsm["correct"], pgd["correct"]),
        checks.pgd_keeps_up_with_apgd(pgd["correct"], of(make_apgd(ASKED, 50))["correct"]),
        checks.black_box_never_beats_white_box(pgd["correct"], of(make_square(ASKED, 200))["correct"]),
        checks.unbounded_attack_succeeds({e: of(make_pgd(ASKED, 20, e))["correct"] for e in (EPS, 0.5, 1.0)}),
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
    assert "100 of 100 images" in found["gradients exist"].sentence


def test_saturated_logits_are_found_out(small_model, digits_images: EvaluationImages) -> None:
    found = verdicts(Saturated(small_model), digits_images.evenly(100))
    assert not found["gradients exist"].passed


def outcomes(right: int, wrong: int) -> Tensor:
    return torch.cat([torch.ones(right), torch.zeros(wrong)])


def test_loss_may_not_fall_image_by_image() -> None:
    """A fall of the mean that a few images make, or that is tiny, is none; one that most images share is."""
    base = torch.linspace(1, 2, 60)
    rises = checks.loss_rises_with_steps({1: base, 5: base + 0.5, 20: base + 0.49})
    assert rises.passed, "a fall of 0.5 % means nothing"
    falls = checks.loss_rises_with_steps({1: base, 5: base + 0.5, 20: base + 0.2})
    assert not falls.passed and "from 5 to 20 on 60 of 60 images" in falls.sentence
    one = base.clone()
    one[0] -= 30
    assert checks.loss_rises_with_steps({1: base, 5: one}).passed


def test_one_step_that_breaks_what_many_leave_fails() -> None:
    """53.1 against 45.3 % on 64 images is five images one way and none the other: p = 1/32."""
    fgsm, pgd = outcomes(29, 35), outcomes(34, 30)
    verdict = checks.iterative_beats_one_step(fgsm, pgd)
    assert not verdict.passed and verdict.numbers["p"] == pytest.approx(1 / 32) and "WEAKER" in verdict.sentence
    close = checks.iterative_beats_one_step(outcomes(30, 34), outcomes(32, 32))
    assert close.passed and "within chance" in close.sentence and "at least as strong" not in close.sentence
    swapped = outcomes(32, 32).flip(0)  # equal percentages, other images: nothing to hold against either
    assert checks.iterative_beats_one_step(swapped, outcomes(32, 32)).passed


def test_one_odd_image_in_64_does_not_fail_a_model() -> None:
    white = outcomes(30, 34)
    black = white.clone()
    black[0] = 0
    assert checks.black_box_never_beats_white_box(white, black).passed
    black[:4] = 0
    assert not checks.black_box_never_beats_white_box(white, black).passed
    assert checks.gradients_exist(outcomes(1, 63)).passed
    assert not checks.gradients_exist(outcomes(4, 60)).passed
    assert checks.unbounded_attack_succeeds({0.1: white, 1.0: outcomes(1, 63)}).passed
    assert not checks.unbounded_attack_succeeds({0.1: white, 1.0: outcomes(4, 60)}).passed


def test_accuracy_must_reach_zero_and_not_rise() -> None:
    zero, half = torch.zeros(200), outcomes(100, 100)
    assert checks.unbounded_attack_succeeds({0.1: half, 1.0: zero}).passed
    assert not checks.unbounded_attack_succeeds({0.1: half, 1.0: half}).passed
    rising = checks.unbounded_attack_succeeds({0.1: zero, 0.2: half, 1.0: zero})
    assert not rising.passed and "RISES" in rising.sentence
    missed = outcomes(6, 194)  # broken at 0.5, so no sign of a hidden gradient at 1 but that they come back
    assert not checks.unbounded_attack_succeeds({0.1: half, 0.5: zero, 1.0: missed}).passed
    assert checks.unbounded_attack_succeeds({0.1: half, 0.5: zero, 1.0: outcomes(3, 197)}).passed


def test_gradients_must_beat_noise_on_most_images() -> None:
    noise = torch.zeros(40)
    assert checks.gradient_beats_noise(torch.ones(40), noise).passed
    lucky = torch.cat([torch.full((4,), 100.0), torch.full((36,), -0.1)])  # a large mean made by four images
    assert not checks.gradient_beats_noise(lucky, noise).passed


def test_few_images_raise_no_alarm() -> None:
    """Of one to four images no sign test can say anything, and one that Square finds proves nothing."""
    for count in (1, 2, 3, 4):
        noise, steps = torch.zeros(count), torch.ones(count)
        found = checks.gradient_beats_noise(steps, noise)
        assert found.passed and "too few images to tell" in found.sentence
        assert checks.pgd_keeps_up_with_apgd(steps, torch.cat([torch.zeros(1), steps[1:]])).passed
    assert not checks.gradient_beats_noise(torch.zeros(4), torch.ones(4)).passed, (
        "four of four the wrong way are a sign"
    )
    for count in (2, 4, 48):
        one, none = outcomes(1, count - 1), outcomes(0, count)
        assert checks.black_box_never_beats_white_box(one, none).passed
        assert checks.gradients_exist(one).passed and checks.unbounded_attack_succeeds({1.0: one}).passed


def test_pgd_that_apgd_leaves_behind_fails() -> None:
    """The L1 attack of 5 % sparsity left 183 of 200 images where APGD left 133; a few images more are APGD's right."""
    weak = checks.pgd_keeps_up_with_apgd(outcomes(183, 17), outcomes(133, 67))
    assert not weak.passed and "much WEAKER" in weak.sentence and weak.numbers["only_apgd"] == 50
    assert checks.pgd_keeps_up_with_apgd(outcomes(58, 42), outcomes(55, 45)).passed
    assert not checks.pgd_keeps_up_with_apgd(outcomes(55, 9), outcomes(43, 21)).passed, "on 64 images too"


def test_exact_tests_against_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for k, n, p in ((0, 10, 0.3), (3, 64, 0.01), (7, 12, 0.5), (40, 40, 0.9), (500, 10000, 0.05)):
        wanted = stats.binom.sf(k - 1, n, p)
        assert statistics.binomial_tail(k, n, p) == pytest.approx(wanted, rel=1e-8)
    for b, c in ((5, 0), (3, 9), (10, 10)):
        assert statistics.mcnemar_two_sided(b, c) == pytest.approx(stats.binomtest(b, b + c).pvalue, rel=1e-9)


def test_paired_intervals_cover_the_truth() -> None:
    """95 % of them, over many draws of pairs with known differences."""
    generator = torch.Generator().manual_seed(0)
    only_first, only_second, total, hits = 0.15, 0.05, 200, 0
    draws = torch.rand(1000, total, generator=generator)
    for row in draws:
        b = int((row < only_first).sum())
        c = int((row > 1 - only_second).sum())
        difference, low, high = statistics.paired_difference(b, c, total)
        assert difference == pytest.approx((b - c) / total)
        hits += low <= only_first - only_second <= high
    assert 930 <= hits <= 970
