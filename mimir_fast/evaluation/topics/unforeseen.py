"""Attacks of other kinds than the evaluated ball: other norms, bending, turning, JPEG, colours, a patch, features."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from mimir_fast.attacks.lp import attack_classifier
from mimir_fast.attacks.patch import patch
from mimir_fast.attacks.perceptual import layers_with_places, perceptual
from mimir_fast.attacks.recolor import recolor
from mimir_fast.attacks.unforeseen import elastic, jpeg, turn
from mimir_fast.evaluation.attacks import NamedAttack, make_threat, parameters_of
from mimir_fast.evaluation.html import paragraph, percent, span, table
from mimir_fast.evaluation.measure import Measurement, Records
from mimir_fast.evaluation.options import NORM_WORDS, CommonOptions, Norm, radius_text
from mimir_fast.evaluation.topic import Numbers, Setup, Topic, options_of, register
from mimir_fast.sizes import area, height_width

SUITES = ("full", "strongest")
STEPS = 20
COLOURS = 0.06
"""Largest change of a colour, as Laidlaw & Feizi have it."""
PATCH, PLACES = 0.2, 3
"""Side of the patch as a part of the image's, and how many places it is tried at."""
FEATURES, ROUNDS = 0.5, 5
"""Largest distance of features, as Laidlaw et al. have it, and rounds of the attack."""


@dataclass
class UnforeseenOptions:
    """Whether attacks of other kinds run."""

    unforeseen: Literal["suite", "yes", "no"] = "suite"
    """Attacks of other kinds: other norms, elastic deformation, rotation and shift, changes of JPEG coefficients and of
    colours, a patch, and images that look alike to the model's own layers."""


def attacks(config: CommonOptions, has_places: bool) -> list[NamedAttack]:
    """All kinds, the perceptual one where the model's layers have places; sizes are for 32 × 32 pixels and scale with
    the side of a square of as many."""
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

    side = max(1, round(PATCH * min(height_width(config.data.image_size))))

    def paint(model: nn.Module, x: Tensor, y: Tensor, samples: Tensor) -> Tensor:
        return recolor(model, x, y, change=COLOURS, num_steps=STEPS, samples=samples, seed=seed)

    def stick(model: nn.Module, x: Tensor, y: Tensor, samples: Tensor) -> Tensor:
        return patch(model, x, y, side=side, num_steps=STEPS, places=PLACES, samples=samples, seed=seed)

    def resemble(model: nn.Module, x: Tensor, y: Tensor, samples: Tensor) -> Tensor:
        layers = layers_with_places(model, x[:2])
        return perceptual(
            model, x, y, layers=layers, bound=FEATURES, num_steps=STEPS, rounds=ROUNDS, samples=samples, seed=seed
        )  # fmt: skip

    found += [
        NamedAttack("elastic", f"elastic, {1.5 * scale:g} pixels", bend,
                    {"pixels": 1.5 * scale, "grid": 8, "num_steps": STEPS, "seed": seed}, 3.0 * STEPS, False),
        NamedAttack("turn", "rotation to 30°, shift to 10 %", rotate,
                    {"degrees": 30, "shift": 0.1, "angles": 7, "shifts": 9}, 63.0, False),
        NamedAttack("jpeg", "JPEG coefficients, half a quantisation step", compress,
                    {"eps": 0.5, "num_steps": STEPS, "seed": seed}, 3.0 * STEPS, False),
        NamedAttack("recolor", f"colours changed by up to {COLOURS:g}", paint,
                    {"change": COLOURS, "points": 8, "num_steps": STEPS, "seed": seed}, 3.0 * STEPS, False),
        NamedAttack("patch", f"a patch of {side} × {side} pixels", stick,
                    {"side": side, "num_steps": STEPS, "places": PLACES, "seed": seed}, 3.0 * STEPS * PLACES, False),
    ]  # fmt: skip
    if has_places:
        found.append(NamedAttack(
            "perceptual", f"features of its own layers changed by up to {FEATURES:g}", resemble,
            {"bound": FEATURES, "num_steps": STEPS, "rounds": ROUNDS, "seed": seed}, 4.0 * STEPS * ROUNDS, False,
        ))  # fmt: skip
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
    return [attack.on(keep=setup.keep(attack.name)) for attack in attacks(config, setup.has_places)]


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
        "The sections above have one threat model; these have others, and no part in the robust accuracy. Some "
        "are written after Kang et al., arXiv 1908.08016, and not calibrated as theirs are: compare models by them, "
        "and not with published scores."
    )
    if "perceptual" not in numbers:
        words += " The perceptual attack was left out: the model shows no layers whose outputs have places."
    return paragraph(words) + table(["attack", "accuracy", "95 % interval"], rows, numbers=(1, 2))


register(Topic("unforeseen", "Unforeseen attacks", measurements, summarize, render, 70, UnforeseenOptions))
