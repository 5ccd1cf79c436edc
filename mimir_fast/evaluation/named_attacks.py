"""The attacks of a suite by name, with the parameters the papers use written down beside them.

PGD-k: ε as asked, α = ε/4 (2/255 at 8/255, 1/255 at 4/255: facts of MIMIR's evaluation), random start, last iterate.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mimir_fast.attacks.adaptive import pgd_features, pgd_mi
from mimir_fast.attacks.apgd import apgd
from mimir_fast.attacks.pgd import fgsm, pgd, random_start
from mimir_fast.attacks.threat_model import LinfThreat
from mimir_fast.evaluation.accuracy import Attack, clean


@dataclass(frozen=True)
class NamedAttack:
    """An attack and what a reader must know to repeat it.

    Attributes:
        name: key in results and file names.
        label: for tables.
        run: the attack.
        parameters: JSON-able, recorded with the numbers.
    """

    name: str
    label: str
    run: Attack
    parameters: dict[str, Any] = field(default_factory=dict)


def natural() -> NamedAttack:
    """No attack."""
    return NamedAttack("natural", "natural", clean)


def make_fgsm(eps: float) -> NamedAttack:
    """One step of size ε from the clean image."""

    def run(model: nn.Module, x: Tensor, y: Tensor, samples: Tensor) -> Tensor:
        return fgsm(model, x, y, eps, mode="eval")

    return NamedAttack("fgsm", "FGSM", run, {"eps": eps, "num_steps": 1})


def step_size(eps: float, num_steps: int) -> float:
    """ε/4 for 20 steps and more (the papers' 2/255 at 8/255); with fewer steps 2.5 ε/k, which can cross the ball."""
    return min(1.0, max(eps / 4, 2.5 * eps / max(num_steps, 1)) if num_steps > 1 else eps)


def make_pgd(eps: float, num_steps: int, seed: int) -> NamedAttack:
    """PGD with cross entropy."""
    threat = LinfThreat(eps=eps, alpha=step_size(eps, num_steps), num_steps=num_steps, random_start=True)

    def run(model: nn.Module, x: Tensor, y: Tensor, samples: Tensor) -> Tensor:
        return pgd(model, x, y, threat, samples=samples, seed=seed, mode="eval")

    return NamedAttack(f"pgd{num_steps}", f"PGD-{num_steps}", run, {**asdict(threat), "loss": "ce", "seed": seed})


def make_apgd(eps: float, num_steps: int, seed: int) -> NamedAttack:
    """Auto-PGD with cross entropy, the first of AutoAttack's four."""

    def run(model: nn.Module, x: Tensor, y: Tensor, samples: Tensor) -> Tensor:
        return apgd(
            model, x, y, eps, num_steps, random_start=True, samples=samples, seed=seed, keep="adversarial", mode="eval"
        )

    parameters = {"eps": eps, "num_steps": num_steps, "loss": "ce", "seed": seed}
    return NamedAttack(f"apgd{num_steps}", f"APGD-CE-{num_steps}", run, parameters)


def make_pgd_mi(eps: float, num_steps: int, seed: int, weight: float) -> NamedAttack:
    """PGD on cross entropy plus λ·HSIC(x+δ, z)."""
    threat = LinfThreat(eps=eps, alpha=step_size(eps, num_steps), num_steps=num_steps)

    def run(model: nn.Module, x: Tensor, y: Tensor, samples: Tensor) -> Tensor:
        return pgd_mi(model, x, y, threat, weight=weight, samples=samples, seed=seed)

    parameters = {**asdict(threat), "weight": weight, "estimator": "hsic", "seed": seed}
    return NamedAttack(f"pgd_mi{num_steps}", f"PGD-MI-{num_steps}", run, parameters)


def make_pgd_features(eps: float, num_steps: int, seed: int) -> NamedAttack:
    """PGD on the distance of features."""
    threat = LinfThreat(eps=eps, alpha=step_size(eps, num_steps), num_steps=num_steps)

    def run(model: nn.Module, x: Tensor, y: Tensor, samples: Tensor) -> Tensor:
        return pgd_features(model, x, threat, samples=samples, seed=seed)

    parameters = {**asdict(threat), "loss": "feature distance", "seed": seed}
    return NamedAttack(f"pgd_fea{num_steps}", f"PGD-fea-{num_steps}", run, parameters)


def make_random_noise(eps: float, seed: int) -> NamedAttack:
    """Uniform noise in the ball pushed to its corners: what a perturbation of full size does without a gradient."""

    def run(model: nn.Module, x: Tensor, y: Tensor, samples: Tensor) -> Tensor:
        start = random_start(torch.full_like(x, 0.5), 0.5, samples=samples, seed=seed)  # away from the clamp at 0 and 1
        return (x + eps * (start - 0.5).sign()).clamp(0, 1)

    return NamedAttack("random", "random ±ε noise", run, {"eps": eps, "seed": seed})


def make_square(eps: float, num_queries: int, seed: int) -> NamedAttack:
    """Square attack (Andriushchenko et al., arXiv 1912.00049) by pyautoattack: it sees logits, never a gradient."""

    def run(model: nn.Module, x: Tensor, y: Tensor, samples: Tensor) -> Tensor:
        try:
            from pyautoattack.square import SquareAttack
        except ImportError as error:
            raise ImportError("the Square attack comes with AutoAttack's package: pip install pyautoattack") from error
        attack = SquareAttack(
            model, norm="Linf", eps=eps, n_queries=num_queries, seed=seed, device=x.device, verbose=False
        )
        devices = [x.device.index or 0] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad():
            adversarial = attack.perturb(x.clone(), y.clone())
        return x + (adversarial - x).clamp(-eps, eps)

    return NamedAttack(
        "square", f"Square, {num_queries} queries", run, {"eps": eps, "queries": num_queries, "seed": seed}
    )
