"""Attacks of other kinds than the evaluated ball: other norms, bending, turning, JPEG coefficients."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from mimir_fast.attacks.lp import attack_classifier
from mimir_fast.attacks.unforeseen import elastic, jpeg, turn
from mimir_fast.evaluation.attacks import NamedAttack, make_threat, parameters_of
from mimir_fast.evaluation.html import paragraph, percent, span, table
from mimir_fast.evaluation.measure import Measurement, Records
from mimir_fast.evaluation.options import NORM_WORDS, CommonOptions, Norm, radius_text
from mimir_fast.evaluation.topic import Numbers, Setup, Topic, options_of, register
from mimir_fast.sizes import area

SUITES = ("full",)
STEPS = 20


@dataclass
class UnforeseenOptions:
    """Whether attacks of other kinds run."""

    unforeseen: Literal["suite", "yes", "no"] = "suite"
    """Attacks of other kinds: other norms, elastic deformation, rotation and shift, changes of JPEG coefficients."""


def attacks(config: CommonOptions) -> list[NamedAttack]:
    """All kinds; sizes are for 32 × 32 pixels and scale with the side of a square of as many."""
    scale, seed = area(config.data.image_size) ** 0.5 / 32, config.seed
    volume = scale * (config.data.channels / 3) ** 0.5
    radii: dict[Norm, float] = {"linf": 8 / 255, "l2": 0.5 * volume, "l1": 12 * volume**2}
    found = [_ball(config, norm, radius) for norm, radius in radii.items() if norm != config.norm]

    def bend(model: nn.Module, x: Tensor, y: Tensor, samples: Tensor) -> Tensor:
        return elastic(model, x, y, pixels=1.5 * scale, num_steps=STEPS, samples=samples, seed=seed)

    def rotate(model: nn.Module, x: Tensor, y: Tensor, samples: Tensor) -> Tensor:
        return turn(model, x, y, degrees=30, shift=0.1)

    def compress(model: nn.Module, x: Tensor, y: Tensor, samples: Tensor) -> Tensor:
        return jpeg(model, x, y, eps=0.5, num_steps=STEPS, samples=samples, seed=seed)

    found += [
        NamedAttack("elastic", f"elastic, {1.5 * scale:g} pixels", bend,
                    {"pixels": 1.5 * scale, "grid": 8, "num_steps": STEPS, "seed": seed}, 3.0 * STEPS, False),
        NamedAttack("turn", "rotation to 30°, shift to 10 %", rotate,
                    {"degrees": 30, "shift": 0.1, "angles": 7, "shifts": 9}, 63.0, False),
        NamedAttack("jpeg", "JPEG coefficients, half a quantisation step", compress,
                    {"eps": 0.5, "num_steps": STEPS, "seed": seed}, 3.0 * STEPS, False),
    ]  # fmt: skip
    return found


def _ball(config: CommonOptions, norm: Norm, radius: float) -> NamedAttack:
    threat = make_threat(norm, radius, STEPS)

    def run(model: nn.Module, x: Tensor, y: Tensor, samples: Tensor) -> Tensor:
        return attack_classifier(model, x, y, threat, samples=samples, seed=config.seed)

    label = f"{NORM_WORDS[norm]} PGD-{STEPS}, ε = {radius_text(radius, norm)}"
    return NamedAttack(
        f"unforeseen_{norm}", label, run, {**parameters_of(threat), "seed": config.seed}, 3.0 * STEPS, False
    )  # fmt: skip


def measurements(setup: Setup) -> list[Measurement]:
    """Every kind on every image."""
    config, asked = setup.config, options_of(setup.config, UnforeseenOptions).unforeseen
    if asked == "no" or (asked == "suite" and config.suite not in SUITES):
        return []
    return [attack.on(keep=setup.keep(attack.name)) for attack in attacks(config)]


def summarize(setup: Setup, items: Sequence[Measurement], records: Records) -> Numbers | None:
    """Correct images under each kind of attack."""
    return {
        item.name: {"label": item.label, **records.count(item).as_dict(), "parameters": item.parameters}
        for item in items
    } or None


def render(numbers: Numbers) -> str:
    """A table with one row a kind of attack."""
    rows = [[e["label"], percent(e["accuracy"]), span(e["interval"])] for e in numbers.values()]
    words = (
        "The sections above have one threat model; these attacks have others. They are written after Kang et al., "
        "arXiv 1908.08016, and not calibrated as theirs are: compare models by them, not with published scores."
    )
    return paragraph(words) + table(["attack", "accuracy", "95 % interval"], rows, numbers=(1, 2))


register(Topic("unforeseen", "Unforeseen attacks", measurements, summarize, render, 70, UnforeseenOptions))
