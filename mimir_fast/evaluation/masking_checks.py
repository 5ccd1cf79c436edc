"""Is the robustness real, or are the gradients hidden? Symptoms of gradient masking, with verdicts in plain words.

Athalye et al., arXiv 1802.00420, §3.1, and Carlini et al., arXiv 1902.06705, §3: iterative attacks beat one step, more
steps never hurt the attacker, black-box attacks do not beat white-box ones, an unbounded attack always succeeds, and
the gradient is a better direction than noise.

All checks read outcomes of the same images, one number an image, so each compares like with like.
"""

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


@dataclass
class Verdict:
    """One check's result.

    Attributes:
        name: short, for the table.
        passed: no symptom was found.
        sentence: what was seen, in plain words.
        numbers: what it was judged by.
    """

    name: str
    passed: bool
    sentence: str
    numbers: dict[str, Any] = field(default_factory=dict)


def _percent(correct: Tensor) -> str:
    return f"{100 * float(correct.double().mean()):.1f} %"


def _noise_of(count: int) -> float:
    """Two standard errors of a difference of accuracies over `count` images, at worst."""
    return 2 * math.sqrt(0.5 / count)


def loss_rises_with_steps(losses: dict[int, Tensor], tolerance: float = 0.02) -> Verdict:
    """More steps must not give a lower loss.

    Args:
        losses: number of steps → (N,) loss at the attack's end.
        tolerance: relative fall that counts as noise.
    """
    means = {steps: float(loss.double().mean()) for steps, loss in sorted(losses.items())}
    values = list(means.values())
    falls = [later < earlier - tolerance * abs(earlier) for earlier, later in pairwise(values)]
    listing = ", ".join(f"{steps}: {value:.3f}" for steps, value in means.items())
    passed = not any(falls)
    words = "The loss rises with the steps of PGD" if passed else "The loss FALLS when PGD takes more steps"
    return Verdict("loss rises with steps", passed, f"{words} ({listing}).", {"mean_loss": means})


def iterative_beats_one_step(fgsm: Tensor, iterative: Tensor) -> Verdict:
    """(N,) correct under FGSM and under PGD: one step must not beat many."""
    gap = float(iterative.double().mean() - fgsm.double().mean())
    passed = gap <= _noise_of(len(fgsm)) / 2
    verb = "is at least as strong as" if passed else "is WEAKER than"
    sentence = f"PGD ({_percent(iterative)} left) {verb} one step of FGSM ({_percent(fgsm)} left)."
    return Verdict("many steps beat one", passed, sentence, {"accuracy_gap": gap})


def black_box_never_beats_white_box(white: Tensor, black: Tensor) -> Verdict:
    """(N,) correct under gradient attacks and under a black-box attack: the latter must find (almost) nothing new."""
    only_black = int(((white > 0) & (black == 0)).sum())
    share = only_black / len(white)
    passed = share <= 0.01 and float(black.double().mean()) >= float(white.double().mean()) - 0.002
    words = "no image" if only_black == 0 else f"{only_black} of {len(white)} images"
    sentence = (
        f"The black-box attack leaves {_percent(black)}, the gradient attacks {_percent(white)}; it breaks {words} "
        "that the gradients did not."
    )
    return Verdict("black-box never beats white-box", passed, sentence, {"only_black_box": only_black})


def unbounded_attack_succeeds(correct: dict[float, Tensor], chance: float) -> Verdict:
    """ε → (N,) correct: accuracy must fall to zero as ε grows, and not rise on the way.

    An image that falls at a small ε has fallen at every larger one, though a coarse step may have missed it there.

    Args:
        chance: 1 / classes; at ε = 1 an attack that merely paints grey would leave this much.
    """
    outcomes = dict(sorted(correct.items()))
    curve = {eps: float(c.double().mean()) for eps, c in outcomes.items()}
    rises = any(b > a + _noise_of(len(next(iter(correct.values())))) / 2 for a, b in pairwise(curve.values()))
    standing = float(torch.stack([c.double() for c in outcomes.values()]).amin(dim=0).mean())
    passed = standing <= min(0.01, chance / 2) and not rises
    listing = ", ".join(f"{255 * eps:.0f}/255: {100 * value:.1f} %" for eps, value in curve.items())
    words = (
        "Accuracy falls to zero"
        if passed
        else ("Accuracy RISES on the way" if rises else "Accuracy does NOT reach zero")
    )
    return Verdict("unbounded attack succeeds", passed, f"{words} as ε grows ({listing}).", {"accuracy": curve})


def gradient_beats_noise(fgsm_loss: Tensor, random_loss: Tensor) -> Verdict:
    """(N,) losses at equal ε: a step along the gradient must raise the loss more than random signs do."""
    better = float((fgsm_loss > random_loss).double().mean())
    means = float(fgsm_loss.double().mean()), float(random_loss.double().mean())
    passed = means[0] > means[1] and better > 0.5
    verb = "raises" if passed else "does NOT raise"
    sentence = (
        f"The gradient {verb} the loss more than random noise of the same size ({means[0]:.3f} against {means[1]:.3f}; "
        f"on {100 * better:.0f} % of the images)."
    )
    return Verdict("gradient beats noise", passed, sentence, {"share": better, "fgsm": means[0], "random": means[1]})


def gradients_exist(zero_gradient: Tensor) -> Verdict:
    """(N,) 1 where the gradient to the image is exactly zero or not finite."""
    share = float(zero_gradient.double().mean())
    passed = share <= 0.05
    sentence = f"{100 * share:.1f} % of the images have a gradient that is zero or not finite."
    return Verdict("gradients exist", passed, sentence, {"share": share})


def zero_gradients(model: torch.nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """(B,) 1 where the cross entropy's gradient to the image is zero everywhere, or not finite anywhere."""
    from mimir_fast.attacks.modes import borrowed_in_mode
    from mimir_fast.attacks.pgd import cross_entropy

    with borrowed_in_mode(model, "eval") as module, torch.enable_grad():
        x = images.detach().clone().requires_grad_()
        (grad,) = torch.autograd.grad(cross_entropy(module(x), labels).sum(), x)
    flat = grad.flatten(1)
    return ((flat == 0).all(dim=1) | ~flat.isfinite().all(dim=1)).int()
