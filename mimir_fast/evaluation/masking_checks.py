"""Gradient-masking checks: symptoms by which a model looks more robust than it is, each with what was observed.

Athalye et al., arXiv 1802.00420, §3.1, and Carlini et al., arXiv 1902.06705, §3: iterative attacks beat one step, more
steps never hurt the attacker, black-box attacks do not beat white-box ones, an unbounded attack always succeeds, and
the gradient is a better direction than noise.

All checks read outcomes of the same images, one number an image, and test pairs: an exact McNemar or sign test at 5 %
asks whether the images themselves say so, not whether two percentages differ. A check that no symptom speaks against
has passed; where a difference points the wrong way within chance, the sentence says that.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mimir_fast.evaluation.statistics import binomial_tail, discordant, mcnemar

LEVEL = 0.05
ODD_ONE = 0.01
"""Share of images that may be odd without meaning anything: one in 64 must not fail a model."""


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
    means = {steps: float(loss.double().mean()) for steps, loss in sorted(losses.items())}
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


def black_box_never_beats_white_box(white: Tensor, black: Tensor) -> Verdict:
    """(N,) correct under gradient attacks and under a black-box attack: the latter must find (almost) nothing new."""
    only_black, only_white = discordant(white.tolist(), black.tolist())
    new = binomial_tail(only_black, len(white), ODD_ONE)
    stronger = mcnemar(only_black, only_white)
    passed = new >= LEVEL and stronger >= LEVEL
    words = "no image" if only_black == 0 else f"{only_black} of {len(white)} images"
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
    standing is counted per image over all radii, and rising is tested per image between neighbours.
    """
    outcomes = dict(sorted(correct.items()))
    labels = labels or {eps: f"{255 * eps:.3g}/255" for eps in outcomes}
    count = len(next(iter(outcomes.values())))
    rises = []
    for (small, before), (large, after) in pairwise(outcomes.items()):
        back, broken = discordant(after.tolist(), before.tolist())
        if (p := mcnemar(back, broken)) < LEVEL:
            rises.append(f"from {labels[small]} to {labels[large]} {back} images come back, {broken} fall ({_p(p)})")
    standing = int(torch.stack([c.double() for c in outcomes.values()]).amin(dim=0).sum())
    p = binomial_tail(standing, count, ODD_ONE)
    passed = p >= LEVEL and not rises
    curve = {labels[eps]: float(c.double().mean()) for eps, c in outcomes.items()}
    listing = ", ".join(f"{name}: {100 * value:.1f} %" for name, value in curve.items())
    if rises:
        words = f"Accuracy RISES on the way: {'; '.join(rises)}"
    elif not passed:
        words = f"Accuracy does NOT reach zero as ε grows: {standing} of {count} images stand at every ε"
    else:
        words = "Accuracy falls to zero as ε grows" + (f", but for {standing} of {count} images" if standing else "")
    numbers = {"accuracy": curve, "standing": standing, "rises": rises}
    return Verdict("unbounded attack succeeds", passed, f"{words} ({listing}).", numbers)


def gradient_beats_noise(step_loss: Tensor, random_loss: Tensor) -> Verdict:
    """(N,) losses at equal ε: a step along the gradient must raise an image's loss more than random signs do."""
    higher, lower = int((step_loss > random_loss).sum()), int((step_loss < random_loss).sum())
    p = mcnemar(higher, lower)
    means = float(step_loss.double().mean()), float(random_loss.double().mean())
    passed = p < LEVEL
    verb = "raises" if passed else "does NOT raise"
    sentence = (
        f"A step along the gradient {verb} the loss more than random noise of the same size: on {higher} of "
        f"{len(step_loss)} images, less on {lower} (sign test, {_p(p)}; means {means[0]:.3f} and {means[1]:.3f})."
    )
    return Verdict(
        "gradient beats noise", passed, sentence, {"higher": higher, "lower": lower, "p": p, "means": list(means)}
    )


def gradients_exist(zero_gradient: Tensor) -> Verdict:
    """(N,) 1 where the gradient to the image is exactly zero or not finite."""
    count = int(zero_gradient.sum())
    p = binomial_tail(count, len(zero_gradient), ODD_ONE)
    passed = p >= LEVEL
    sentence = f"{count} of {len(zero_gradient)} images have a gradient that is zero or not finite" + (
        "." if passed or not count else f": attacks that follow it stand still there ({_p(p)})."
    )
    share = count / max(1, len(zero_gradient))
    return Verdict("gradients exist", passed, sentence, {"share": share, "p": p})


def zero_gradients(model: torch.nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """(B,) 1 where the cross entropy's gradient to the image is zero everywhere, or not finite anywhere."""
    from mimir_fast.attacks.pgd import cross_entropy
    from mimir_fast.layers.borrowing import borrowed

    with borrowed(model, "eval") as module, torch.enable_grad():
        x = images.detach().clone().requires_grad_()
        (grad,) = torch.autograd.grad(cross_entropy(module(x), labels).sum(), x)
    flat = grad.flatten(1)
    return ((flat == 0).all(dim=1) | ~flat.isfinite().all(dim=1)).int()
