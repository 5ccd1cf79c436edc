"""The attacks that several topics use, by name, with what a reader must know to repeat them.

PGD-k: ε as asked, α = ε/4 unless asked otherwise (2/255 at 8/255, 1/255 at 4/255: the papers'), random starts, last
iterate. At 2/255 the papers step by 1/255, and so do the suites that repeat their attacks. Each maker takes the
configuration, and the radius where it is not the configuration's.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mimir_fast.attacks.lp import (
    ONE_STEP_PART,
    LpThreat,
    Threat,
    ascent,
    attack_classifier,
    random_in_ball,
    sparsity_of,
    start_of,
)  # fmt: skip
from mimir_fast.attacks.pgd import Loss, check_images, cross_entropy, random_start
from mimir_fast.attacks.threat_model import LinfThreat
from mimir_fast.attacks.until_broken import first_to_fool
from mimir_fast.evaluation.measure import Attack, Measurement, clean, scored
from mimir_fast.evaluation.options import CommonOptions, Norm
from mimir_fast.layers.borrowing import borrowed


@dataclass(frozen=True)
class NamedAttack:
    """An attack and what a reader must know to repeat it.

    Attributes:
        name: key in results and file names.
        label: for tables.
        run: the attack.
        parameters: JSON-able, recorded with the numbers.
        cost: passes through the model an image takes, roughly.
        in_ball: its perturbations lie within the evaluated ball.
    """

    name: str
    label: str
    run: Attack
    parameters: dict[str, Any] = field(default_factory=dict)
    cost: float = 1.0
    in_ball: bool = True

    def on(self, images: str = "all", name: str = "", keep: Path | None = None) -> Measurement:
        """The measurement of a set of images under this attack; `keep` is a folder for the attacked images."""
        return Measurement(
            name or self.name, scored(self.run, keep), self.parameters, images, self.label, self.cost, self.in_ball
        )


PAPERS_ALPHA = {"2/255": 1 / 255}
"""ε of an L∞ ball → α where the papers do not take ε/4, in the suites `paper` and `full`."""


def step_size(eps: float, num_steps: int, usual: float | None = None) -> float:
    """`usual`, ε/4 (the papers' 2/255 at 8/255) where left out, for 10 steps and more; with fewer at least 2.5 ε/k,
    which can cross the ball."""
    usual = eps / 4 if usual is None else usual
    return max(usual, 2.5 * eps / max(num_steps, 1)) if num_steps > 1 else eps


def make_threat(norm: Norm, eps: float, num_steps: int, alpha: float | None = None) -> Threat:
    """The ball, and how it is searched."""
    if alpha is None:  # an L1 attack starts with steps through the whole ball, as its authors' does, and shortens them
        alpha = eps if norm == "l1" else step_size(eps, num_steps)
    if norm == "linf":
        return LinfThreat(eps=eps, alpha=min(alpha, 1.0), num_steps=num_steps)
    return LpThreat(norm=norm, eps=eps, alpha=alpha, num_steps=num_steps)


def threat_of(config: CommonOptions, num_steps: int) -> Threat:
    """The configuration's ball, and how it is searched: with its α, or the papers'."""
    alpha = config.alpha
    if alpha is None and config.norm == "linf" and config.suite in ("paper", "full"):
        alpha = step_size(config.eps, num_steps, PAPERS_ALPHA.get(config.eps_text))
    return make_threat(config.norm, config.eps, num_steps, alpha)


def parameters_of(threat: Threat, *, adaptive: bool = True) -> dict[str, Any]:
    """What a reader must know to repeat a search; two that are equal in it are equally strict.

    `sparsity`, of L1 only: which pixels a step moves. PGD's α is the length of its first L1 step there; see
    `lp.sparsity_of` for those after it.

    Args:
        adaptive: the search is PGD's; else each L1 step is of length α and moves a part of the pixels, as momentum's.
    """
    if not isinstance(threat, LpThreat) or threat.norm != "l1":
        return asdict(threat)
    return asdict(threat) | {"sparsity": sparsity_of(threat) if adaptive else {"pixels": ONE_STEP_PART}}


def natural() -> NamedAttack:
    """The clean images themselves."""
    return NamedAttack("natural", "no attack", clean, in_ball=False)


def attack_averaged(
    model: nn.Module, images: Tensor, labels: Tensor, threat: Threat, *, draws: int, loss: Loss = cross_entropy,
    samples: Tensor | None = None, seed: int = 0, step: int | Tensor = 0,
) -> Tensor:  # fmt: skip
    """`attack_classifier` on the mean loss over `draws` passes of a random model (Athalye et al., arXiv 1707.07397).

    One pass is in memory at a time: its gradient is taken at once, and what the ascent differentiates is the product of
    the images and of the gradients' mean.
    """
    if draws == 1:
        return attack_classifier(model, images, labels, threat, loss=loss, samples=samples, seed=seed, step=step)
    check_images(images)
    start = start_of(images.detach(), threat, samples=samples, seed=seed, step=step)
    with borrowed(model, "eval") as module:

        def objective(x: Tensor) -> Tensor:
            mean = torch.zeros_like(x)
            for _ in range(draws):
                copy = x.detach().requires_grad_()
                mean += torch.autograd.grad(loss(module(copy), labels).sum(), copy)[0] / draws
            return (x * mean).flatten(1).sum(1)

        return ascent(objective, images.detach(), start, threat)


def make_fgsm(config: CommonOptions) -> NamedAttack:
    """One step of size ε from the clean image: FGSM, in L2 and L1 balls FGM."""
    threat = replace(make_threat(config.norm, config.eps, 1, config.eps), random_start=False)
    draws = config.eot or 1

    def run(model: nn.Module, x: Tensor, y: Tensor, samples: Tensor) -> Tensor:
        return attack_averaged(model, x, y, threat, draws=draws)

    name = "fgsm" if config.norm == "linf" else "fgm"  # the fast gradient method: no sign is taken
    label = name.upper() + draws_words(draws)
    return NamedAttack(name, label, run, {**parameters_of(threat), **draws_said(draws)}, cost=3 * draws)


def draws_words(draws: int) -> str:
    """For labels: how many draws of a random model a gradient is the mean of; nothing for one."""
    return f", {draws} draws" if draws > 1 else ""


def draws_said(draws: int) -> dict[str, int]:
    """The same for parameters."""
    return {"eot": draws} if draws > 1 else {}


def make_pgd(
    config: CommonOptions, num_steps: int, eps: float | None = None, *, restarts: int | None = None
) -> NamedAttack:
    """PGD with cross entropy; of several random starts, an image keeps the first that is misclassified."""
    radius = config.eps if eps is None else eps
    restarts = config.restarts if restarts is None else restarts
    threat = threat_of(config, num_steps) if eps is None else make_threat(config.norm, radius, num_steps)
    draws = config.eot or 1

    def run(model: nn.Module, x: Tensor, y: Tensor, samples: Tensor) -> Tensor:
        def attempt(rows: Tensor, starts: Tensor) -> Tensor:
            return attack_averaged(
                model, x[rows], y[rows], threat, draws=draws, samples=samples[rows], seed=config.seed, step=starts
            )

        return first_to_fool(model, x, y, attempt, restarts)

    label = f"PGD-{num_steps}" + (f", {restarts} starts" if restarts > 1 else "") + draws_words(draws)
    parameters = {**parameters_of(threat), "loss": "ce", "restarts": restarts, "seed": config.seed, **draws_said(draws)}
    inside = radius <= config.eps * (1 + 1e-9)
    return NamedAttack(f"pgd{num_steps}", label, run, parameters, 3.0 * num_steps * restarts * draws, inside)


def make_random_noise(config: CommonOptions, eps: float | None = None) -> NamedAttack:
    """Noise on the ball's surface: what a perturbation of full size does without a gradient."""
    radius = config.eps if eps is None else eps

    def run(model: nn.Module, x: Tensor, y: Tensor, samples: Tensor) -> Tensor:
        if config.norm != "linf":
            return random_in_ball(x, radius, config.norm, samples=samples, seed=config.seed, surface=True)
        # Away from the clamp at 0 and 1; only its signs are used, so the noise sits in the ball's corners.
        start = random_start(torch.full_like(x, 0.5), 0.5, samples=samples, seed=config.seed)
        return (x + radius * (start - 0.5).sign()).clamp(0, 1)

    inside = radius <= config.eps * (1 + 1e-9)
    parameters = {"norm": config.norm, "eps": radius, "seed": config.seed}
    return NamedAttack("random", "random noise of full size", run, parameters, in_ball=inside)
