"""Accuracy against ε, under PGD and under random noise of the same size, on the images of the masking checks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mimir_fast.evaluation.attacks import make_pgd, make_random_noise, natural
from mimir_fast.evaluation.charts import Line, line_chart
from mimir_fast.evaluation.html import figure, figures, percent, span, table
from mimir_fast.evaluation.measure import Measurement, Records
from mimir_fast.evaluation.options import NORM_WORDS, CommonOptions, radius_text
from mimir_fast.evaluation.topic import Numbers, Setup, Topic, register

NAME, NATURAL = "curve", "check_natural"


@dataclass(frozen=True)
class Amount:
    """How much a suite does.

    Attributes:
        images: on how many the curve and the masking checks are made.
        steps: of PGD.
        near: radii as multiples of ε.
        far: radii on to where no model can be right, as parts of the largest radius there is.
    """

    images: int
    steps: int
    near: tuple[float, ...]
    far: tuple[float, ...]


NEAR = (0.25, 0.5, 1.0, 1.5, 2.0)
FAR = tuple(levels / 255 for levels in (8, 16, 32, 64, 128, 255))
SUITES = {
    "quick": Amount(64, 10, (0.5, 1.0, 2.0), FAR[3:]),
    "paper": Amount(200, 20, NEAR, FAR),
    "full": Amount(500, 20, NEAR, FAR),
}


def images_of(setup: Setup) -> str:
    """Name of the set of images of the curve and of the masking checks."""
    return setup.subset(SUITES[setup.config.suite].images)


def radii_of(config: CommonOptions) -> list[float]:
    """Radii of the curve, ascending: around ε, and on to where no model can be right; [] where there is no curve."""
    if (amount := SUITES.get(config.suite)) is None:
        return []
    size = config.data.channels * config.data.image_size**2
    # From one corner of [0, 1]^D to the other: nothing is out of reach.
    whole = {"linf": 1.0, "l2": size**0.5, "l1": float(size)}[config.norm]
    radii = [config.eps, *(factor * config.eps for factor in amount.near), *(part * whole for part in amount.far)]
    # Told apart by what people read: 12/255 and 1.5 · 8/255 may differ in the last bit.
    distinct = {radius_text(radius, config.norm): radius for radius in radii if radius <= whole * (1 + 1e-9)}
    return sorted(distinct.values())


def name_at(kind: str, config: CommonOptions, radius: float) -> str:
    """Name of the measurement of a kind (`curve`: PGD, `noise`) at a radius."""
    return f"{kind}_{radius_text(radius, config.norm).replace('/', '_')}"


def measurements(setup: Setup) -> list[Measurement]:
    """No attack; then PGD and noise at every radius."""
    config, found = setup.config, list[Measurement]()
    for radius in radii_of(config):
        images = images_of(setup)
        found = found or [natural().on(images, NATURAL)]
        pgd = make_pgd(config, SUITES[config.suite].steps, radius, restarts=1)
        found.append(pgd.on(images, name_at("curve", config, radius)))
        found.append(make_random_noise(config, radius).on(images, name_at("noise", config, radius)))
    return found


def summarize(setup: Setup, items: Sequence[Measurement], records: Records) -> Numbers | None:
    """Accuracies along ε, ε = 0 first."""
    if not items:
        return None
    config, radii = setup.config, radii_of(setup.config)
    count = {item.name: records.count(item) for item in items}
    start = count[NATURAL]
    attacked, noisy = (
        [start, *(count[name_at(kind, config, radius)] for radius in radii)] for kind in ("curve", "noise")
    )
    return {
        "eps": [0.0, *radii],
        "labels": ["0", *(radius_text(radius, config.norm) for radius in radii)],
        "accuracy": [c.accuracy for c in attacked],
        "interval": [list(c.interval) for c in attacked],
        "noise": [c.accuracy for c in noisy],
        "count": start.total,
        "num_steps": SUITES[config.suite].steps,
        "judged": config.eps,
        "norm": config.norm,
    }


def render(numbers: Numbers) -> str:
    """Two figures to scale, one around the evaluated ε and one to where no model can stand, and the numbers."""
    columns = list(
        zip(numbers["eps"], numbers["labels"], numbers["accuracy"], numbers["interval"], numbers["noise"], strict=True)
    )
    unit = 255 if numbers["norm"] == "linf" else 1
    axis = "ε · 255" if unit == 255 else f"ε ({NORM_WORDS[numbers['norm']]})"
    evaluated = unit * numbers["judged"]

    def chart(rows: list[Any], words: str) -> str:
        lines = [
            Line(f"under PGD-{numbers['num_steps']}", [(unit * e, 100 * a) for e, _, a, _, _ in rows],
                 [(100 * low, 100 * high) for _, _, _, (low, high), _ in rows]),
            Line("under random noise", [(unit * e, 100 * n) for e, _, _, _, n in rows]),
        ]  # fmt: skip
        return line_chart(
            lines, words, x_label=axis, y_label="accuracy (%)", percent=True, x_from=0.0,
            x_ticks=[(unit * e, f"{unit * e:.4g}") for e, *_ in rows],
            mark=(evaluated, f"evaluated at {evaluated:.4g}"),
        )  # fmt: skip

    near = [row for row in columns if row[0] <= 2.5 * numbers["judged"]]
    said = "; ".join(f"{percent(a)} at {label}" for _, label, a, _, _ in near)
    words = f"Accuracy on {numbers['count']} images around the evaluated ε; the band is a 95 % interval."
    shown = [figure(chart(near, f"{words} Under PGD: {said}."), words)]
    if len(near) < len(columns):
        far = f"The same to the largest ε there is, where accuracy is {percent(columns[-1][2])}."
        shown.append(figure(chart(columns, far), far))
    rows = [[label, percent(a), span(i), percent(n)] for _, label, a, i, n in columns]
    return figures(*shown) + table(
        ["ε", "under PGD", "95 % interval", "under random noise"], rows, numbers=(1, 2, 3),
        caption=f"Accuracy along ε, {numbers['count']} images",
    )  # fmt: skip


def compare(models: Sequence[tuple[str, Numbers]]) -> str:
    """The curves of several models in one figure, with their intervals."""
    norm, eps = models[0][1]["norm"], models[0][1]["judged"]
    unit, lines = 255 if norm == "linf" else 1, []
    for name, found in models:
        if found["norm"] != norm:
            continue
        rows = [
            (unit * e, 100 * a, (100 * low, 100 * high))
            for e, a, (low, high) in zip(found["eps"], found["accuracy"], found["interval"], strict=True)
            if e <= 4 * eps
        ]
        label = f"{name} ({found['count']} images, PGD-{found['num_steps']})"
        lines.append(Line(label, [(e, a) for e, a, _ in rows], [band for _, _, band in rows]))
    ticks = sorted({x for line in lines for x, _ in line.points})
    words = "Accuracy under PGD against ε, each model with its 95 % interval."
    said = "; ".join(f"{line.label}: " + ", ".join(f"{y:.1f} % at {x:.4g}" for x, y in line.points) for line in lines)
    chart = line_chart(
        lines, f"{words} {said}.", x_label="ε · 255" if unit == 255 else "ε", y_label="accuracy (%)", percent=True,
        x_ticks=[(x, f"{x:.4g}") for x in ticks], x_from=0.0, mark=(unit * eps, f"evaluated at {unit * eps:.4g}"),
    )  # fmt: skip
    return figures(figure(chart, words))


register(Topic(NAME, "Accuracy against ε", measurements, summarize, render, 40, compare=compare))
