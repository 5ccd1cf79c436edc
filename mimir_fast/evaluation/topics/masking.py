"""Gradient-masking checks: symptoms by which a model looks more robust than it is, each with what was observed.

Athalye et al., arXiv 1802.00420, §3.1, and Carlini et al., arXiv 1902.06705, §3: iterative attacks beat one step, more
steps never hurt the attacker, black-box attacks do not beat white-box ones, an unbounded attack always succeeds, and
the gradient is a better direction than noise. PGD, by which these are told, must itself not be much weaker than APGD,
which chooses its steps. AutoAttack's own checks are added where it ran.

All checks read outcomes of the same images, one number an image, and test pairs: an exact McNemar or sign test at 5 %
asks whether single images changed sides, not whether two percentages differ. A check without a symptom has passed;
where a difference points the wrong way within chance, the sentence tells it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from mimir_fast.attacks.apgd import apgd
from mimir_fast.attacks.pgd import cross_entropy
from mimir_fast.evaluation.attacks import NamedAttack, make_fgsm, make_pgd, make_random_noise
from mimir_fast.evaluation.charts import Line, line_chart
from mimir_fast.evaluation.finite import finite_mean
from mimir_fast.evaluation.html import figure, figures
from mimir_fast.evaluation.measure import Measurement, Records, Row
from mimir_fast.evaluation.options import CommonOptions, radius_text
from mimir_fast.evaluation.package import packaged_attack
from mimir_fast.evaluation.statistics import (
    LEVEL,
    ODD_ONE,
    binomial_tail,
    discordant,
    mcnemar,
    odd_p,
    paired_difference,
)
from mimir_fast.evaluation.topic import Numbers, Setup, Topic, register
from mimir_fast.evaluation.topics import autoattack, curve
from mimir_fast.layers.borrowing import borrowed
from mimir_fast.validation import counted

CHECK_STEPS = {
    "quick": (1, 2, 5, 10, 20), "paper": (1, 2, 5, 10, 20, 50), "full": (1, 2, 5, 10, 20, 50, 100),
    "strongest": (1, 2, 5, 10, 20, 50),
}  # fmt: skip
"""Of PGD, for "the loss rises with the steps", by suite; the images are those of the curve."""
QUERIES = {"quick": 300, "paper": 1000, "full": 5000, "strongest": 1000}
"""Of the black-box attack."""
MOSTLY = 0.75
"""Share of the images whose loss a step along the gradient raises more than noise does, at least, without masking."""
WEAKER = 0.03
"""Share of the images that APGD may break beyond PGD, at the 95 % interval's lower end."""


@dataclass
class Verdict:
    """One check's result.

    Attributes:
        name: short, for the table.
        passed: no symptom was found.
        sentence: what was seen, in plain words.
        numbers: what it was decided by.
    """

    name: str
    passed: bool
    sentence: str
    numbers: dict[str, Any] = field(default_factory=dict)


def _percent(correct: Tensor) -> str:
    return f"{100 * float(correct.double().mean()):.1f} %"


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.2g}"


def loss_rises_with_steps(losses: dict[int, Tensor], tolerance: float = 0.02) -> Verdict:
    """More steps must not give a lower loss, image by image.

    Args:
        losses: number of steps → (N,) loss at the attack's end, of the same images.
        tolerance: fall relative to the mean loss that means nothing, however certain it is.
    """
    means = {steps: finite_mean(loss) for steps, loss in sorted(losses.items())}
    falls = []
    for (few, before), (many, after) in pairwise(sorted(losses.items())):
        change = (after - before).double()
        lower, higher = int((change < 0).sum()), int((change > 0).sum())
        fall = float(-change.mean())
        if fall > tolerance * abs(float(before.double().mean())) and mcnemar(lower, higher) < LEVEL:
            falls.append(f"from {few} to {many} on {lower} of {len(change)} images ({_p(mcnemar(lower, higher))})")
    listing = ", ".join(f"{steps}: {value:.3f}" for steps, value in means.items())
    words = f"The loss FALLS when PGD takes more steps, {'; '.join(falls)}" if falls else (
        "The loss does not fall when PGD takes more steps"
    )  # fmt: skip
    return Verdict(
        "loss rises with steps",
        not falls,
        f"{words} ({listing}).",
        {"mean_loss": {str(k): v for k, v in means.items()}, "falls": falls},
    )


def iterative_beats_one_step(fgsm: Tensor, iterative: Tensor) -> Verdict:
    """(N,) correct under one step and under PGD: one step must not break images that many steps leave."""
    only_one, only_many = discordant(iterative.tolist(), fgsm.tolist())
    p = mcnemar(only_one, only_many)
    passed = p >= LEVEL
    counts = f"one step alone breaks {only_one} images, many steps alone {only_many}; {_p(p)}"
    left = f"accuracy {_percent(iterative)} under PGD, {_percent(fgsm)} under one step"
    if not passed:
        sentence = f"PGD is WEAKER than one step: {left} ({counts})."
    elif only_one > only_many:
        sentence = f"PGD looks weaker than one step, but within chance: {left} ({counts})."
    else:
        sentence = f"PGD is at least as strong as one step: {left} ({counts})."
    return Verdict("many steps beat one", passed, sentence, {"only_one": only_one, "only_many": only_many, "p": p})


def pgd_keeps_up_with_apgd(pgd: Tensor, apgd: Tensor) -> Verdict:
    """(N,) correct under PGD and under APGD: what chooses its own steps may break a few images more, not many."""
    only_apgd, only_pgd = discordant(pgd.tolist(), apgd.tolist())
    difference, low, _ = paired_difference(only_apgd, only_pgd, len(pgd))
    passed = low <= WEAKER
    words = "is about as strong as" if passed else "is much WEAKER than"
    sentence = (
        f"PGD {words} APGD: accuracy {_percent(pgd)} under PGD, {_percent(apgd)} under APGD (PGD alone breaks "
        f"{only_pgd} images, APGD alone {only_apgd}){'.' if passed else ': its steps are too large, small or few.'}"
    )
    numbers = {"only_pgd": only_pgd, "only_apgd": only_apgd, "difference": difference, "low": low}
    return Verdict("PGD keeps up with APGD", passed, sentence, numbers)


def black_box_never_beats_white_box(white: Tensor, black: Tensor) -> Verdict:
    """(N,) correct under gradient attacks and under a black-box attack: the latter must find (almost) nothing new."""
    only_black, only_white = discordant(white.tolist(), black.tolist())
    new = odd_p(only_black, len(white))
    stronger = mcnemar(only_black, only_white)
    passed = new >= LEVEL and stronger >= LEVEL
    words = "no image" if only_black == 0 else f"{only_black} of {counted(len(white), 'image')}"
    end = (
        "that is MORE than chance allows where gradients can be followed"
        if not passed
        else "as it should be"
        if only_black == 0
        else f"which one in {round(1 / ODD_ONE)} odd images would explain ({_p(new)})"
    )
    sentence = (
        f"Accuracy {_percent(black)} under the black-box attack, {_percent(white)} under gradient attacks; it breaks "
        f"{words} that the gradients did not, {end}."
    )
    numbers = {"only_black_box": only_black, "only_white_box": only_white, "p_new": new, "p_stronger": stronger}
    return Verdict("black-box never beats white-box", passed, sentence, numbers)


def unbounded_attack_succeeds(correct: dict[float, Tensor], labels: dict[float, str] | None = None) -> Verdict:
    """ε → (N,) correct, ε ascending on to where nothing is out of reach: accuracy must fall to zero and never rise.

    An image that falls at a small ε has fallen at every larger one, though a coarse step may have missed it there; so
    images are counted as right only if they are at every radius, and rising is tested per image between neighbours.
    """
    outcomes = dict(sorted(correct.items()))
    labels = labels or {eps: f"{255 * eps:.3g}/255" for eps in outcomes}
    count = len(next(iter(outcomes.values())))
    rises = []
    for (small, before), (large, after) in pairwise(outcomes.items()):
        back, broken = discordant(after.tolist(), before.tolist())
        if (p := mcnemar(back, broken)) < LEVEL:
            rises.append(f"from {labels[small]} to {labels[large]} {back} images come back, {broken} fall ({_p(p)})")
    never = int(torch.stack([c.double() for c in outcomes.values()]).amin(dim=0).sum())
    p = odd_p(never, count)
    passed = p >= LEVEL and not rises
    accuracy = {labels[eps]: float(c.double().mean()) for eps, c in outcomes.items()}
    listing = ", ".join(f"{name}: {100 * value:.1f} %" for name, value in accuracy.items())
    if rises:
        words = f"Accuracy RISES on the way: {'; '.join(rises)}"
    elif not passed:
        words = f"Accuracy does NOT reach zero as ε grows: {never} of {counted(count, 'image')} never fell"
    else:
        words = "Accuracy falls to zero as ε grows" + (
            f", but for {never} of {counted(count, 'image')}" if never else ""
        )
    numbers = {"accuracy": accuracy, "standing": never, "rises": rises}
    return Verdict("unbounded attack succeeds", passed, f"{words} ({listing}).", numbers)


def gradient_beats_noise(step_loss: Tensor, random_loss: Tensor) -> Verdict:
    """(N,) losses at equal ε: a step along the gradient must raise an image's loss more than random signs do.

    Passed where it does on more images than not, or where there are too few images to tell: four that all rise leave
    p = 1/16. Failed where it does on fewer than most images, and no such test tells it from noise.
    """
    higher, lower = int((step_loss > random_loss).sum()), int((step_loss < random_loss).sum())
    total, p = len(step_loss), mcnemar(higher, lower)
    means = finite_mean(step_loss), finite_mean(random_loss)
    raises, too_few = p < LEVEL, binomial_tail(total - higher, total, 1 - MOSTLY) >= LEVEL
    passed = raises or too_few
    verb = "raises" if raises else "may raise" if too_few else "does NOT raise"
    sentence = (
        f"A step along the gradient {verb} the loss more than random noise of the same size: on {higher} of "
        f"{total} images, less on {lower} (sign test, {_p(p)}; means {means[0]:.3f} and {means[1]:.3f})"
        f"{'.' if raises or not too_few else ': too few images to tell.'}"
    )
    return Verdict(
        "gradient beats noise", passed, sentence, {"higher": higher, "lower": lower, "p": p, "means": list(means)}
    )


def gradients_exist(zero_gradient: Tensor) -> Verdict:
    """(N,) 1 where the gradient to the image is exactly zero or not finite."""
    count = int(zero_gradient.sum())
    p = odd_p(count, len(zero_gradient))
    passed = p >= LEVEL
    sentence = f"The gradient is zero or not finite on {count} of {counted(len(zero_gradient), 'image')}" + (
        "." if passed or not count else f": attacks that follow it stand still there ({_p(p)})."
    )
    share = count / max(1, len(zero_gradient))
    return Verdict("gradients exist", passed, sentence, {"share": share, "p": p})


def zero_gradients(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """(B,) 1 where the cross entropy's gradient to the image is zero everywhere, or not finite anywhere."""
    with borrowed(model, "eval") as module, torch.enable_grad():
        x = images.detach().clone().requires_grad_()
        (grad,) = torch.autograd.grad(cross_entropy(module(x), labels).sum(), x)
    flat = grad.flatten(1)
    return ((flat == 0).all(dim=1) | ~flat.isfinite().all(dim=1)).int()


def make_apgd(config: CommonOptions, num_steps: int) -> NamedAttack:
    """Auto-PGD with cross entropy, the first of AutoAttack's four; for L1 by its authors' package."""

    packaged = packaged_attack(config, "apgd", n_iter=num_steps, n_restarts=1, use_largereps=True)

    def run(model: nn.Module, x: Tensor, y: Tensor, samples: Tensor) -> Tensor:
        if config.norm == "l1":
            return packaged(model, x, y, samples)
        return apgd(
            model, x, y, config.eps, num_steps, random_start=True, samples=samples, seed=config.seed,
            keep="adversarial", mode="eval", norm=config.norm,
        )  # fmt: skip

    parameters = {"norm": config.norm, "eps": config.eps, "num_steps": num_steps, "loss": "ce", "seed": config.seed}
    return NamedAttack(f"apgd{num_steps}", f"APGD-CE-{num_steps}", run, parameters, 3.0 * num_steps)


def make_square(config: CommonOptions, num_queries: int) -> NamedAttack:
    """Square attack (Andriushchenko et al., arXiv 1912.00049) by pyautoattack: it sees logits, never a gradient."""
    run = packaged_attack(config, "square", n_queries=num_queries)
    parameters = {"norm": config.norm, "eps": config.eps, "queries": num_queries, "seed": config.seed}
    return NamedAttack("square", f"Square, {num_queries} queries", run, parameters, num_queries / 2)


def _zero_gradient(model: nn.Module, images: Tensor, labels: Tensor, samples: Tensor) -> Row:
    return {"zero_gradient": zero_gradients(model, images, labels)}


def measurements(setup: Setup) -> list[Measurement]:
    """One step, many steps, APGD, a black box, noise, and the gradients themselves, on the same images."""
    config = setup.config
    if config.suite not in CHECK_STEPS:
        return []
    few = curve.images_of(setup)
    return [
        make_fgsm(config).on(few, "check_fgsm"),
        make_random_noise(config).on(few, "check_random"),
        Measurement("check_gradients", _zero_gradient, {}, few, cost=2),
        *(make_pgd(config, k, restarts=1).on(few, f"steps_{k}") for k in CHECK_STEPS[config.suite]),
        make_apgd(config, 50).on(few, "check_apgd50"),
        make_square(config, QUERIES[config.suite]).on(few, "check_square"),
    ]


def summarize(setup: Setup, items: Sequence[Measurement], records: Records) -> Numbers | None:
    """The verdict of every check."""
    if not items:
        return None
    config, item_of = setup.config, {item.name: item for item in items}

    def of(name: str, value: str = "correct") -> Tensor:
        return records.tensor(item_of[name], value)

    by_steps = {item.parameters["num_steps"]: item for item in items if item.name.startswith("steps_")}
    losses = {steps: records.tensor(item, "loss") for steps, item in by_steps.items()}
    strongest = records.tensor(by_steps[max(by_steps)], "correct")
    far = {eps: item for eps, item in curve.along_pgd(records.items(curve.NAME)).items() if eps >= config.eps}
    verdicts = [
        loss_rises_with_steps(losses),
        iterative_beats_one_step(of("check_fgsm"), strongest),
        pgd_keeps_up_with_apgd(strongest, of("check_apgd50")),
        black_box_never_beats_white_box(strongest * of("check_apgd50"), of("check_square")),
        unbounded_attack_succeeds(
            {eps: records.tensor(item, "correct") for eps, item in far.items()},
            {eps: radius_text(eps, config.norm) for eps in far},
        ),
        gradient_beats_noise(of("check_fgsm", "loss"), of("check_random", "loss")),
        gradients_exist(of("check_gradients", "zero_gradient")),
    ]
    for item in records.items(autoattack.NAME):
        warnings = autoattack.warnings_of(item, records)
        words = " ".join(warnings) if warnings else "AutoAttack's package gives no warning."
        verdicts.append(Verdict("AutoAttack's own checks", not warnings, words))
    return {
        "checks": [asdict(verdict) for verdict in verdicts],
        "count": len(of("check_fgsm")),
        "mean_loss": {str(k): finite_mean(loss) for k, loss in losses.items()},
    }


def render(numbers: Numbers) -> str:
    """One row a check, and the loss over the steps."""
    rows = "".join(
        f'<tr><th scope="row" class="{"is-good" if c["passed"] else "is-bad"}">'
        f"{'passed' if c['passed'] else 'FAILED'}</th>"
        f"<td><b>{escape(c['name'])}</b><br>{escape(c['sentence'])}</td></tr>"
        for c in numbers["checks"]
    )
    table = (
        f'<div class="frame" tabindex="0" role="region" aria-label="Gradient-masking checks"><table><caption>On '
        f"{counted(numbers['count'], 'image')}; paired tests at 5 %.</caption><thead><tr>"
        f'<th scope="col">result</th><th scope="col">check</th></tr></thead><tbody>{rows}</tbody></table></div>'
    )
    points = [(float(k), v) for k, v in numbers["mean_loss"].items() if v is not None]
    if not points:
        return table
    first, last = points[0], points[-1]
    words = f"Mean loss under PGD-{first[0]:g}: {first[1]:.3g}; under PGD-{last[0]:g}: {last[1]:.3g}."
    chart = line_chart(
        [Line("mean loss", points)], words, x_label="steps of PGD", y_label="mean loss",
        x_ticks=[(k, f"{k:g}") for k, _ in points], x_from=0.0,
    )  # fmt: skip
    return table + figures(figure(chart, words))


register(Topic("masking", "Gradient-masking checks", measurements, summarize, render, 30))
