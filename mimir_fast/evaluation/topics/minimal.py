"""The smallest perturbation of each image: distances in place of an accuracy at one radius, and their median, ε₅₀.

A distance is the size of a perturbation whose image was scored as misclassified in fp32, so it bounds the true distance
from above, and the accuracy at every radius too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mimir_fast.attacks.minimal import smallest_perturbation
from mimir_fast.evaluation.charts import Line, line_chart
from mimir_fast.evaluation.html import figure, figures, paragraph, percent, span, table
from mimir_fast.evaluation.measure import Measurement, Outcome, Records, Row, save_images, score
from mimir_fast.evaluation.options import NORM_WORDS, Norm
from mimir_fast.evaluation.statistics import Count, median_interval
from mimir_fast.evaluation.topic import Column, Numbers, Setup, Topic, options_of, register
from mimir_fast.evaluation.topics.classes import histogram
from mimir_fast.validation import check_number

NAME = "minimal"
STEPS, ROUNDS, PGD_STEPS = 100, 6, 20
POINTS = 40
"""Of the curve."""


@dataclass
class MinimalOptions:
    """On how many images the smallest perturbation is looked for."""

    minimal: int = 0
    """Look for the smallest perturbation (in --norm) that breaks each of that many images, evenly spaced; 0 leaves it
    out. About 1000 passes through the model an image."""

    def __post_init__(self) -> None:
        check_number("minimal", self.minimal, at_least=0, hint="0 leaves the smallest perturbations out")


def measurements(setup: Setup) -> list[Measurement]:
    """The search, on some images. At the evaluated ε it is one more attack within the ball."""
    config, few = setup.config, options_of(setup.config, MinimalOptions).minimal
    if not few:
        return []
    parameters = {
        "norm": config.norm, "eps": config.eps, "fmn_steps": STEPS, "rounds": ROUNDS, "pgd_steps": PGD_STEPS
    }  # fmt: skip
    images = setup.subset(few) if few < setup.num_images else "all"
    cost = 3.0 * (STEPS + 2 * ROUNDS * PGD_STEPS)
    return [Measurement(NAME, _search(setup), parameters, images, "smallest perturbation", cost, in_ball=True)]


def _search(setup: Setup) -> Outcome:
    norm, eps, keep = setup.config.norm, setup.config.eps, setup.keep(NAME)

    def outcome(model: nn.Module, images: Tensor, labels: Tensor, samples: Tensor) -> Row:
        x = smallest_perturbation(
            model, images, labels, norm, num_steps=STEPS, rounds=ROUNDS, pgd_steps=PGD_STEPS
        )  # fmt: skip
        row = score(model, x, images, labels)
        if keep is not None:
            save_images(keep, x, labels, samples, row["prediction"])
        wrong = row["correct"] == 0
        # At the border, and where that is beyond ε, no margin of an attack within the ball.
        del row["margin"]
        return row | {"wrong": wrong.int(), "correct": (~(wrong & (row[norm] <= eps))).int()}

    return outcome


def summarize(setup: Setup, items: Sequence[Measurement], records: Records) -> Numbers | None:
    """Distances, ε₅₀ with its interval, and the accuracy along ε."""
    if not items:
        return None
    (item,), config = items, setup.config
    rows = records.rows(item)
    distances = [
        size if wrong else math.inf for size, wrong in zip(rows[config.norm], rows["wrong"], strict=True)
    ]  # fmt: skip
    known = [d for d in distances if d < math.inf]
    end, total = max(known, default=0.0) or config.eps, len(distances)
    along = [end * (k / POINTS) for k in range(POINTS + 1)]
    counts = [Count(sum(d > radius for d in distances), total) for radius in along]
    return {
        "norm": config.norm, "judged": config.eps, "eps_text": config.eps_text, "images": setup.num_images,
        "at_eps": records.count(item).as_dict(),
        "clean": sum(d > 0 for d in distances),
        "unbroken": total - len(known),
        "eps50": sorted(distances)[(total - 1) // 2],
        "eps50_interval": median_interval(distances),
        "eps": along, "accuracy": [c.accuracy for c in counts], "interval": [c.interval for c in counts],
        "distances": dict(zip(map(str, rows["sample"]), distances, strict=True)),
        "parameters": item.parameters, "seconds": records.seconds(item),
    }  # fmt: skip


def in_words(radius: float | None, norm: Norm) -> str:
    """A distance for readers, in 255ths for L∞; None: none was found."""
    if radius is None:
        return "not reached"
    return f"{255 * radius:.2f}/255" if norm == "linf" else f"{radius:.4g}"


def eps50_words(numbers: Numbers) -> str:
    """ε₅₀ and its interval."""
    low, high = (in_words(radius, numbers["norm"]) for radius in numbers["eps50_interval"])
    return f"{in_words(numbers['eps50'], numbers['norm'])} (95 % interval {low} to {high})"


def render(numbers: Numbers) -> str:
    """ε₅₀ in words, the accuracy along ε, the histogram."""
    norm, at = numbers["norm"], numbers["at_eps"]
    total, steps = at["total"], numbers["parameters"]
    words = (
        f"ε₅₀ = {eps50_words(numbers)}, {NORM_WORDS[norm]}: the radius at which half of the {total} images are "
        "misclassified, which is the median of the smallest perturbations found (0 where the image is misclassified "
        f"without one). They are the smaller of FMN's (arXiv 2102.12827, {steps['fmn_steps']} steps) and of "
        f"{steps['rounds']} rounds of bisection with PGD-{steps['pgd_steps']} from two starts. Each was seen to be "
        "misclassified in fp32: the true distance is at most that."
    )
    inside = (
        f"At the evaluated ε = {numbers['eps_text']}, {at['correct']} of them are correct ({percent(at['accuracy'])}, "
        f"95 % interval {span(at['interval'])} %)."
    )
    if numbers["unbroken"]:
        inside += f" No perturbation of any size was found for {numbers['unbroken']}: is the gradient masked?"
    along = f"Accuracy along ε from the smallest perturbations of {total} images; the band is a 95 % interval."
    shown = [figure(_curves([_line("smallest perturbation", numbers)], numbers, along), along)]
    scale = _scale(norm)
    if sizes := [scale * d for d in numbers["distances"].values() if d]:
        caption = f"Smallest perturbations of the images that are correct without one: {len(sizes)} were found."
        shown.append(figure(histogram([("images", sizes)], caption, x_label=norm_axis(norm)), caption))
    return paragraph(words) + paragraph(inside) + figures(*shown)


def _scale(norm: Norm) -> int:
    return 255 if norm == "linf" else 1


def norm_axis(norm: Norm) -> str:
    """ε as axes name it."""
    return "ε · 255" if norm == "linf" else f"ε ({NORM_WORDS[norm]})"


def _line(label: str, numbers: Numbers) -> Line:
    scale = _scale(numbers["norm"])
    return Line(
        label, [(scale * e, 100 * a) for e, a in zip(numbers["eps"], numbers["accuracy"], strict=True)],
        [(100 * low, 100 * high) for low, high in numbers["interval"]],
    )  # fmt: skip


def _curves(lines: Sequence[Line], numbers: Numbers, words: str) -> str:
    evaluated = _scale(numbers["norm"]) * numbers["judged"]
    return line_chart(
        lines, words, x_label=norm_axis(numbers["norm"]), y_label="accuracy (%)", percent=True, x_from=0.0,
        mark=(evaluated, f"evaluated at {evaluated:.4g}"),
    )  # fmt: skip


def columns(numbers: Numbers) -> list[Column]:
    """The accuracy at the evaluated ε."""
    at = numbers["at_eps"]
    few = at["total"] if at["total"] < numbers["images"] else None
    return [Column(NAME, "smallest perturbation", at["accuracy"], few)]


def compare(models: Sequence[tuple[str, Numbers]]) -> str:
    """ε₅₀ of each model, and the curves of those with the first one's norm."""
    first = models[0][1]
    rows: list[list[str]] = [
        [name, NORM_WORDS[n["norm"]], in_words(n["eps50"], n["norm"]),
         " to ".join(in_words(radius, n["norm"]) for radius in n["eps50_interval"]), str(n["at_eps"]["total"])]
        for name, n in models
    ]  # fmt: skip
    same: list[tuple[str, Any]] = [(name, n) for name, n in models if n["norm"] == first["norm"]]
    lines = [_line(f"{name} ({n['at_eps']['total']} images)", n) for name, n in same]
    words = "Accuracy along ε from the smallest perturbations, each model with its 95 % interval."
    return table(["model", "norm", "ε₅₀", "95 % interval", "images"], rows, numbers=range(2, 5)) + figures(
        figure(_curves(lines, first, words), words)
    )


register(Topic(
    NAME, "Smallest perturbations", measurements, summarize, render, 45, MinimalOptions, columns=columns,
    compare=compare,
))  # fmt: skip
