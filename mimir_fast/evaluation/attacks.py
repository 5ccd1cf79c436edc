"""The attacks of an evaluation by name, with what a reader must know to repeat them.

PGD-k: ε as asked, α = ε/4 unless asked otherwise (2/255 at 8/255, 1/255 at 4/255: the papers'), random starts, last
iterate. Each maker takes the configuration, and the radius where it is not the judged one.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mimir_fast.attacks.adaptive import pgd_features, pgd_mi
from mimir_fast.attacks.apgd import apgd
from mimir_fast.attacks.lp import LpThreat, Threat, aimed_at, attack_classifier, random_in_ball, size_of
from mimir_fast.attacks.pgd import random_start
from mimir_fast.attacks.threat_model import LinfThreat
from mimir_fast.evaluation.config import EvaluateConfig, Norm
from mimir_fast.evaluation.measure import Attack, Measurement, clean, under
from mimir_fast.ops.hsic import hsic
from mimir_fast.ops.nhsic import nhsic
from mimir_fast.ops.renyi_mi import renyi_mi

ESTIMATORS = {"nhsic": nhsic, "hsic": hsic, "renyi": renyi_mi}


@dataclass(frozen=True)
class NamedAttack:
    """An attack and what a reader must know to repeat it.

    Attributes:
        name: key in results and file names.
        label: for tables.
        run: the attack.
        parameters: JSON-able, recorded with the numbers.
        cost: passes through the model an image takes, roughly.
        breaks: its perturbations lie in the judged ball.
    """

    name: str
    label: str
    run: Attack
    parameters: dict[str, Any] = field(default_factory=dict)
    cost: float = 1.0
    breaks: bool = True

    def on(self, images: str = "all", name: str = "", keep: Path | None = None) -> Measurement:
        """The measurement of what the model makes of a set of images under this attack."""
        return Measurement(
            name or self.name, under(self.run, keep), self.parameters, images, self.label, self.cost, self.breaks
        )


def step_size(eps: float, num_steps: int) -> float:
    """ε/4 for 10 steps and more (the papers' 2/255 at 8/255); with fewer steps 2.5 ε/k, which can cross the ball."""
    return max(eps / 4, 2.5 * eps / max(num_steps, 1)) if num_steps > 1 else eps


def make_threat(norm: Norm, eps: float, num_steps: int, alpha: float | None = None) -> Threat:
    """The ball, and how it is searched."""
    alpha = step_size(eps, num_steps) if alpha is None else alpha
    if norm == "linf":
        return LinfThreat(eps=eps, alpha=min(alpha, 1.0), num_steps=num_steps)
    return LpThreat(norm=norm, eps=eps, alpha=alpha, num_steps=num_steps)


def natural() -> NamedAttack:
    """No attack."""
    return NamedAttack("natural", "no attack", clean, breaks=False)


def make_fgsm(config: EvaluateConfig) -> NamedAttack:
    """One step of size ε from the clean image."""
    threat = replace(make_threat(config.norm, config.eps, 1, config.eps), random_start=False)

    def run(model: nn.Module, x: Tensor, y: Tensor, samples: Tensor) -> Tensor:
        return attack_classifier(model, x, y, threat)

    return NamedAttack("fgsm", "FGSM" if config.norm == "linf" else "one step", run, asdict(threat), cost=3)


def make_pgd(
    config: EvaluateConfig, num_steps: int, eps: float | None = None, *, restarts: int | None = None
) -> NamedAttack:
    """PGD with cross entropy."""
    radius = config.eps if eps is None else eps
    restarts = config.restarts if restarts is None else restarts
    threat = make_threat(config.norm, radius, num_steps, config.alpha if eps is None else None)

    def run(model: nn.Module, x: Tensor, y: Tensor, samples: Tensor) -> Tensor:
        starts = (
            attack_classifier(model, x, y, threat, samples=samples, seed=config.seed, step=start)
            for start in range(restarts)
        )
        return first_to_fool(model, y, starts)

    label = f"PGD-{num_steps}" + (f", {restarts} starts" if restarts > 1 else "")
    parameters = {**asdict(threat), "loss": "ce", "restarts": restarts, "seed": config.seed}
    inside = radius <= config.eps * (1 + 1e-9)
    return NamedAttack(f"pgd{num_steps}", label, run, parameters, 3.0 * num_steps * restarts, inside)


@torch.no_grad()
def first_to_fool(model: nn.Module, labels: Tensor, attempts: Any) -> Tensor:
    """Of several attacked versions of each image (B, C, H, W), the first that is misclassified, else the last."""
    chosen, done = None, torch.zeros_like(labels, dtype=torch.bool)
    for x in attempts:
        chosen = x if chosen is None else torch.where(done.view(-1, 1, 1, 1), chosen, x)
        done = done | (model(chosen).argmax(dim=1) != labels)
        if bool(done.all()):
            break
    assert chosen is not None
    return chosen


def make_targeted(config: EvaluateConfig, num_steps: int) -> NamedAttack:
    """PGD that pushes each of the likeliest wrong classes above the true one, one after the other."""
    threat = make_threat(config.norm, config.eps, num_steps, config.alpha)

    def run(model: nn.Module, x: Tensor, y: Tensor, samples: Tensor) -> Tensor:
        with torch.no_grad():
            logits = model(x).float().scatter(1, y[:, None], -torch.inf)
        count = min(config.targets, logits.shape[1] - 1)
        order = logits.topk(count, dim=1).indices
        aimed = (
            attack_classifier(
                model, x, y, threat, loss=aimed_at(order[:, k]), samples=samples, seed=config.seed, step=k
            )
            for k in range(count)
        )  # fmt: skip
        return first_to_fool(model, y, aimed)

    parameters = {**asdict(threat), "loss": "logit of target − logit of label", "targets": config.targets,
                  "seed": config.seed}  # fmt: skip
    return NamedAttack(
        f"pgd{num_steps}_targeted", f"PGD-{num_steps} at {config.targets} classes", run, parameters,
        3.0 * num_steps * config.targets,
    )  # fmt: skip


def make_apgd(config: EvaluateConfig, num_steps: int) -> NamedAttack:
    """Auto-PGD with cross entropy, the first of AutoAttack's four; for L1 by its authors' package."""
    eps, seed = config.eps, config.seed

    def run(model: nn.Module, x: Tensor, y: Tensor, samples: Tensor) -> Tensor:
        if config.norm == "l1":
            return _packaged(model, x, y, config, "apgd", n_iter=num_steps, n_restarts=1, use_largereps=True)
        return apgd(
            model, x, y, eps, num_steps, random_start=True, samples=samples, seed=seed, keep="adversarial",
            mode="eval", norm=config.norm,
        )  # fmt: skip

    parameters = {"norm": config.norm, "eps": eps, "num_steps": num_steps, "loss": "ce", "seed": seed}
    return NamedAttack(f"apgd{num_steps}", f"APGD-CE-{num_steps}", run, parameters, 3.0 * num_steps)


def make_pgd_mi(config: EvaluateConfig, num_steps: int) -> NamedAttack:
    """PGD on cross entropy plus λ·I(x+δ, z)."""
    threat = make_threat(config.norm, config.eps, num_steps, config.alpha)
    estimator = ESTIMATORS[config.mi_estimator]

    def run(model: nn.Module, x: Tensor, y: Tensor, samples: Tensor) -> Tensor:
        weight = "balanced" if config.mi_balanced else config.mi_weight
        return pgd_mi(model, x, y, threat, weight=weight, estimator=estimator, samples=samples, seed=config.seed)  # type: ignore[arg-type]

    parameters = {
        **asdict(threat), "weight": "balanced" if config.mi_balanced else config.mi_weight,
        "estimator": config.mi_estimator, "seed": config.seed,
    }  # fmt: skip
    return NamedAttack(f"pgd_mi{num_steps}", f"PGD-MI-{num_steps}", run, parameters, 3.0 * num_steps)


def make_pgd_features(config: EvaluateConfig, num_steps: int) -> NamedAttack:
    """PGD on the distance of features."""
    threat = make_threat(config.norm, config.eps, num_steps, config.alpha)

    def run(model: nn.Module, x: Tensor, y: Tensor, samples: Tensor) -> Tensor:
        return pgd_features(model, x, threat, samples=samples, seed=config.seed)

    parameters = {**asdict(threat), "loss": "feature distance", "seed": config.seed}
    return NamedAttack(f"pgd_fea{num_steps}", f"PGD-fea-{num_steps}", run, parameters, 3.0 * num_steps)


def make_random_noise(config: EvaluateConfig, eps: float | None = None) -> NamedAttack:
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
    return NamedAttack("random", "random noise of full size", run, parameters, breaks=inside)


def make_square(config: EvaluateConfig, num_queries: int) -> NamedAttack:
    """Square attack (Andriushchenko et al., arXiv 1912.00049) by pyautoattack: it sees logits, never a gradient."""

    def run(model: nn.Module, x: Tensor, y: Tensor, samples: Tensor) -> Tensor:
        return _packaged(model, x, y, config, "square", n_queries=num_queries)

    parameters = {"norm": config.norm, "eps": config.eps, "queries": num_queries, "seed": config.seed}
    return NamedAttack("square", f"Square, {num_queries} queries", run, parameters, num_queries / 2)


def _packaged(
    model: nn.Module, x: Tensor, y: Tensor, config: EvaluateConfig, name: str, **options: Any
) -> Tensor:  # fmt: skip
    """One attack of pyautoattack, its result pulled back into the ball where it rounds out of it."""
    try:
        from pyautoattack.autopgd_base import APGDAttack
        from pyautoattack.square import SquareAttack
    except ImportError as error:
        raise ImportError(f"the {name} attack comes with AutoAttack's package: pip install pyautoattack") from error
    kind = {"square": SquareAttack, "apgd": APGDAttack}[name]
    norm = {"linf": "Linf", "l2": "L2", "l1": "L1"}[config.norm]
    attack = kind(model, norm=norm, eps=config.eps, seed=config.seed, device=x.device, verbose=False, **options)
    devices = [x.device.index or 0] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        delta = attack.perturb(x.clone(), y.clone()) - x
    if config.norm == "linf":
        return x + delta.clamp(-config.eps, config.eps)
    # A hair inside, as the others' projections are.
    factor = (config.eps * (1 - 1e-6) / size_of(delta, config.norm).clamp_min(1e-12)).clamp(max=1)
    return x + delta * factor.view(-1, 1, 1, 1)
