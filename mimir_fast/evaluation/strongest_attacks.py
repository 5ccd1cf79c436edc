"""The attacks of the suite `strongest`: gradients of several losses, minimal distances, queries, decisions, surrogates.

All stay within the evaluated ball. AutoAttack's four kinds are among them; so is what finds images where gradients
mislead.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mimir_fast.attacks.decision import hop_skip_jump
from mimir_fast.attacks.losses import margin, probability_margin, scaled_cross_entropy
from mimir_fast.attacks.momentum import momentum_ensemble
from mimir_fast.attacks.nearest import apgd_nearest
from mimir_fast.attacks.pgd import Loss, cross_entropy
from mimir_fast.attacks.rays import rays
from mimir_fast.attacks.square import BATCHES_AT_ONCE, square
from mimir_fast.attacks.until_broken import apgd_many, fab_many, pgd_many
from mimir_fast.evaluation.attacks import NamedAttack, make_threat, parameters_of
from mimir_fast.evaluation.options import CommonOptions
from mimir_fast.evaluation.package import packaged_attack

NAMES = (
    "apgd-ce", "apgd-margin", "apgd-scaled", "apgd-probability", "pgd-margin", "pgd-targets", "pgd-restarts",
    "apgd-targets", "fab-targets", "square", "rays", "hopskipjump", "mi-ensemble", "pgn-ensemble", "mi-lgv", "pgn-lgv",
    "apgd-nearest",
)  # fmt: skip
TARGETED = ("pgd-targets", "pgd-restarts", "apgd-targets", "fab-targets")
FROM_OTHERS = ("mi-ensemble", "pgn-ensemble", "mi-lgv", "pgn-lgv")
AROUND_OTHERS = ("mi-lgv", "pgn-lgv")
"""On the models that LGV collects around the others, one after the other."""
RESTARTS = {"apgd-nearest": 1.0, "pgd-restarts": 1.0, "apgd-targets": 0.2}
"""Starts of those that have several, as a multiple of what is asked for; of apgd-nearest the rounds. On digits more
starts break most where they are cheap, of few steps at few targets, or where an attack came near before."""
FEW_TARGETS = 3
"""Of pgd-restarts."""
QUERYING = ("square", "rays", "hopskipjump")
STEPPING = tuple(name for name in NAMES if name not in QUERYING)
NEIGHBOURS = 5
"""Of PGN."""
Models = Callable[[str], Sequence[nn.Module]]
"""An attack's name → the models that its images are made on."""


@dataclass(frozen=True)
class Strength:
    """How long the attacks try.

    Attributes:
        steps: of a gradient attack from one start at one target.
        targets: likeliest wrong classes that targeted attacks aim at.
        restarts: random starts, see RESTARTS.
        queries: of attacks that see no gradient; those that see decisions only have a fifth.
    """

    steps: int
    targets: int
    restarts: int
    queries: int

    def short(self) -> "Strength":
        """What tells which attacks are fast: most of what an attack breaks it breaks early."""
        return Strength(max(1, self.steps // 5), min(3, self.targets), 1, max(1, self.queries // 10))


def undefined(norm: str, num_classes: int, *, others: bool, around: bool) -> dict[str, str]:
    """{attack: why} of those that are not defined here.

    Args:
        others: there are other models.
        around: LGV collects models around these.
    """
    found = dict[str, str]()
    if norm != "linf":
        found["rays"] = "RayS searches the corners of an L∞ ball"
    if norm == "l1":
        found["hopskipjump"] = "HopSkipJump is of L∞ and L2 balls"
        own = "apgd-margin", "apgd-scaled", "apgd-probability", "apgd-nearest"
        found |= dict.fromkeys(own, "APGD with this loss is of L∞ and L2 balls")
        if num_classes < 4:
            found["apgd-targets"] = f"the package's targeted loss compares four logits, there are {num_classes} classes"
    if not around:
        found |= dict.fromkeys(AROUND_OTHERS, "--transfer_lgv collects no models around others")
    if not others:
        found |= dict.fromkeys(FROM_OTHERS, "--transfer_from names no other model")
    return found


def needless(norm: str, num_classes: int) -> dict[str, str]:
    """{attack: why} of those that run only where they are asked for by name, because another one does what they do."""
    found = {"hopskipjump": "by decisions RayS breaks more in L∞, with fewer questions"} if norm == "linf" else {}
    if num_classes == 2:
        words = "of two classes there is one target, and the untargeted margin is the targeted one"
        found |= dict.fromkeys(("pgd-targets", "pgd-restarts", "apgd-targets"), words)
    return found


def from_package(name: str, norm: str) -> bool:
    """Whether an attack is that of AutoAttack's package: what is ours is of L∞ and L2 balls, Square of L∞ only."""
    names = {"linf": (), "l2": ("square",), "l1": ("apgd-ce", "apgd-targets", "fab-targets", "square")}
    return name in names[norm]


def by(name: str, norm: str) -> str:
    """Whose search it is: results and resumed runs of one do not go with those of the other."""
    return "pyautoattack" if from_package(name, norm) else "mimir_fast"


def strongest_attacks(
    config: CommonOptions, strength: Strength, num_classes: int, names: Sequence[str], others: Models
) -> list[NamedAttack]:  # fmt: skip
    """The attacks of these names.

    Args:
        others: loads the models that images are made on.
    """
    return [_make(name, config, strength, num_classes, others) for name in names]


def _make(name: str, config: CommonOptions, strength: Strength, num_classes: int, others: Models) -> NamedAttack:
    if name in FROM_OTHERS:
        return _from_others(name, config, strength, others)
    if name == "apgd-nearest":
        return _nearest(name, config, strength)
    if name in ("rays", "hopskipjump"):
        return _decisions(name, config, strength)
    if name == "fab-targets":
        return _fab(name, config, strength, num_classes)
    if name == "square":
        return _square(name, config, strength)
    if from_package(name, config.norm):
        return _packaged_apgd(name, config, strength, num_classes)
    return _gradient(name, config, strength, num_classes)


LOSSES: dict[str, tuple[str, Loss | None]] = {
    "ce": ("cross entropy", cross_entropy),
    "margin": ("margin", margin),
    "scaled": ("cross entropy of scaled logits", scaled_cross_entropy),
    "probability": ("margin of probabilities", probability_margin),
}


def _gradient(name: str, config: CommonOptions, strength: Strength, num_classes: int) -> NamedAttack:
    """APGD or PGD with a loss, or at several targets."""
    kind, _, what = name.partition("-")
    words, loss = LOSSES.get(what, ("", None))
    count = min(FEW_TARGETS if name == "pgd-restarts" else num_classes, strength.targets, num_classes - 1)
    seed = config.seed + NAMES.index(name)  # starts of its own
    # PGD's steps do not adapt: more of them add little. In L1 it is the only one that is ours.
    steps = strength.steps if kind == "apgd" or config.norm == "l1" else max(1, strength.steps // 5)
    restarts = starts(name, strength)
    threat = make_threat(config.norm, config.eps, steps)

    def run(model: nn.Module, x: Tensor, y: Tensor, samples: Tensor) -> Tensor:
        how: dict[str, Any] = {
            "loss": loss, "num_targets": count, "restarts": restarts, "samples": samples, "seed": seed,
            "rows": config.batch_size,
        }  # fmt: skip
        if kind == "pgd":
            return pgd_many(model, x, y, threat, **how)
        return apgd_many(model, x, y, config.eps, steps, norm=config.norm, **how)  # type: ignore[arg-type]

    if loss is None:
        words = "DLR at targets" if kind == "apgd" and num_classes >= 4 else "margin at targets"
    parameters = {
        **(parameters_of(threat) if kind == "pgd" else {"norm": config.norm, "eps": config.eps, "num_steps": steps}),
        "loss": words, "restarts": restarts, "seed": seed, **({} if loss else {"targets": count}),
    }  # fmt: skip
    label = f"{kind.upper()}-{steps}, {words if loss else f'{count} targets'}{_times(restarts)}"
    return NamedAttack(name, label, run, parameters, 3.0 * steps * restarts * (1 if loss else count))


def _nearest(name: str, config: CommonOptions, strength: Strength) -> NamedAttack:
    """APGD whose starts go to the images that are nearest to be broken."""
    kinds = [LOSSES[kind] for kind in ("margin", "ce")]
    words, losses = " and ".join(words for words, _ in kinds), [loss for _, loss in kinds if loss]
    rounds, seed = starts(name, strength), config.seed + NAMES.index(name)

    def run(model: nn.Module, x: Tensor, y: Tensor, samples: Tensor) -> Tensor:
        return apgd_nearest(
            model, x, y, config.eps, strength.steps, losses=losses, rounds=rounds, norm=config.norm,  # type: ignore[arg-type]
            samples=samples, seed=seed, rows=config.batch_size,
        )  # fmt: skip

    parameters = {
        "norm": config.norm, "eps": config.eps, "num_steps": strength.steps, "loss": words, "rounds": rounds,
        "seed": seed,
    }  # fmt: skip
    label = f"APGD-{strength.steps}, {words}, more starts for the nearest"
    return NamedAttack(name, label, run, parameters, 3.0 * strength.steps * rounds)


def starts(name: str, strength: Strength) -> int:
    """How many random starts an attack has, of each target."""
    return max(1, round(RESTARTS[name] * strength.restarts)) if name in RESTARTS else 1


def _times(restarts: int) -> str:
    return f" × {restarts} starts" if restarts > 1 else ""


def _square(name: str, config: CommonOptions, strength: Strength) -> NamedAttack:
    queries = strength.queries

    def ours(model: nn.Module, x: Tensor, y: Tensor, samples: Tensor) -> Tensor:
        rows = BATCHES_AT_ONCE * config.batch_size
        return square(model, x, y, config.eps, queries, samples=samples, seed=config.seed, rows=rows)

    theirs = packaged_attack(config, "square", n_queries=queries, resc_schedule=False)
    run = theirs if from_package(name, config.norm) else ours
    ball = {"norm": config.norm, "eps": config.eps, "seed": config.seed}
    parameters = {**ball, "queries": queries, "by": by(name, config.norm)}
    return NamedAttack(name, f"Square, {queries} queries", run, parameters, float(queries))


def _fab(name: str, config: CommonOptions, strength: Strength, num_classes: int) -> NamedAttack:
    steps, count = strength.steps, min(strength.targets, num_classes - 1)

    def ours(model: nn.Module, x: Tensor, y: Tensor, samples: Tensor) -> Tensor:
        how: dict[str, Any] = {"num_targets": count, "norm": config.norm, "rows": config.batch_size}
        return fab_many(model, x, y, config.eps, steps, **how)

    theirs = packaged_attack(config, "fab-t", targets=count, n_iter=steps, n_restarts=1)
    run = theirs if from_package(name, config.norm) else ours
    ball = {"norm": config.norm, "eps": config.eps}
    parameters = {**ball, "num_steps": steps, "targets": count, "by": by(name, config.norm)}
    return NamedAttack(name, f"FAB-{steps}, {count} targets", run, parameters, 5.0 * steps * count)


def _packaged_apgd(name: str, config: CommonOptions, strength: Strength, num_classes: int) -> NamedAttack:
    """APGD of L1 balls, with cross entropy or targets."""
    large = strength.steps >= 10  # radii that shrink to ε in three parts of the steps
    parameters = {"norm": config.norm, "eps": config.eps, "seed": config.seed, "num_steps": strength.steps}
    if name == "apgd-ce":
        run = packaged_attack(config, "apgd", n_iter=strength.steps, n_restarts=5, use_largereps=large)
        label = f"APGD-{strength.steps}, cross entropy × 5 starts"
        return NamedAttack(name, label, run, {**parameters, "loss": "ce", "restarts": 5}, 15.0 * strength.steps)
    restarts, count = starts(name, strength), min(strength.targets, num_classes - 1)
    run = packaged_attack(
        config, "apgd-t", targets=count, n_iter=strength.steps, n_restarts=restarts, use_largereps=large
    )
    label = f"APGD-{strength.steps}, {count} targets" + _times(restarts)
    parameters |= {"targets": count, "restarts": restarts}
    return NamedAttack(name, label, run, parameters, 3.0 * strength.steps * restarts * count)


def _decisions(name: str, config: CommonOptions, strength: Strength) -> NamedAttack:
    """What sees the predicted class only."""
    queries = max(1, strength.queries // 5)

    def run(model: nn.Module, x: Tensor, y: Tensor, samples: Tensor) -> Tensor:
        if name == "rays":
            return rays(model, x, y, config.eps, queries=queries)
        return hop_skip_jump(
            model, x, y, config.eps, norm=config.norm, queries=queries, samples=samples, seed=config.seed  # type: ignore[arg-type]
        )  # fmt: skip

    parameters = {"norm": config.norm, "eps": config.eps, "queries": queries, "seed": config.seed}
    label = f"{'RayS' if name == 'rays' else 'HopSkipJump'}, {queries} decisions"
    return NamedAttack(name, label, run, parameters, float(queries))


def _from_others(name: str, config: CommonOptions, strength: Strength, others: Models) -> NamedAttack:
    """Images made on other models together, or on those around them in turn, and shown to this one."""
    neighbours = NEIGHBOURS if name.startswith("pgn") else 0
    around = name in AROUND_OTHERS
    # In turn they need steps enough to meet most of them, and a step costs one.
    steps = max(1, strength.steps // (2 if around and not neighbours else 5))
    threat = make_threat(config.norm, config.eps, steps)

    def run(model: nn.Module, x: Tensor, y: Tensor, samples: Tensor) -> Tensor:
        return momentum_ensemble(
            others(name), x, y, threat, together=1 if around else None, neighbours=neighbours, samples=samples,
            seed=config.seed,
        )  # fmt: skip

    kind = "PGN" if neighbours else "MI-FGSM"
    parameters = {
        **parameters_of(threat, adaptive=False),
        "random_start": False,
        "neighbours": neighbours,
        "seed": config.seed,
    }
    label = f"{kind}-{steps} on {'models around other ones' if around else 'other models'}"
    return NamedAttack(name, label, run, parameters, 6.0 * steps * max(1, neighbours))
