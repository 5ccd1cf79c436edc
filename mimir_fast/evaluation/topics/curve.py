"""Accuracy against ε, under PGD and under random noise of the same size, on the images of the masking checks."""

from collections.abc import Sequence
from typing import Any

from mimir_fast.evaluation.attacks import make_pgd, make_random_noise, natural
from mimir_fast.evaluation.charts import Line, line_chart
from mimir_fast.evaluation.html import figure, figures, percent, span, table
from mimir_fast.evaluation.measure import Measurement, Records
from mimir_fast.evaluation.options import NORM_WORDS, CommonOptions, radius_text
from mimir_fast.evaluation.topic import Numbers, Setup, Topic, register
from mimir_fast.sizes import area
from mimir_fast.validation import counted

NAME = "curve"
IMAGES = {"quick": 64, "paper": 200, "full": 500, "strongest": 200}
"""On how many images the curve and the masking checks are made, by suite."""
STEPS = {"quick": 10, "paper": 20, "full": 20, "strongest": 20}
"""Of PGD."""
_NEAR, _FAR = (0.25, 0.5, 1.0, 1.5, 2.0), (8, 16, 32, 64, 128, 255)
NEAR = {"quick": (0.5, 1.0, 2.0), "paper": _NEAR, "full": _NEAR, "strongest": _NEAR}
"""Radii as multiples of ε."""
FAR = {"quick": (64, 128, 255), "paper": _FAR, "full": _FAR, "strongest": _FAR}
"""Radii on to where no model can be right, in 255ths of the largest radius there is."""


def images_of(setup: Setup) -> str:
    """Name of the set of images of the curve and of the masking checks."""
    return setup.subset(IMAGES[setup.config.suite])


def radii_of(config: CommonOptions) -> list[float]:
    """Radii of the curve, ascending: around ε, and on to where no model can be right; [] where there is no curve."""
    if config.suite not in IMAGES:
        return []
    size = config.data.channels * area(config.data.image_size)
    # From one corner of [0, 1]^D to the other: nothing is out of reach.
    whole = {"linf": 1.0, "l2": size**0.5, "l1": float(size)}[config.norm]
    near, far = NEAR[config.suite], FAR[config.suite]
    radii = [config.eps, *(factor * config.eps for factor in near), *(level / 255 * whole for level in far)]
    # Told apart by what is printed: 12/255 and 1.5 · 8/255 may differ in the last bit.
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
        found = found or [natural().on(images, "check_natural")]
        pgd = make_pgd(config, STEPS[config.suite], radius, restarts=1)
        found.append(pgd.on(images, name_at("curve", config, radius)))
        found.append(make_random_noise(config, radius).on(images, name_at("noise", config, radius)))
    return found


def along_pgd(items: Sequence[Measurement]) -> dict[float, Measurement]:
    """Radius → PGD at it, of the curve's measurements; ascending."""
    return {item.parameters["eps"]: item for item in items if item.name.startswith("curve_")}


def summarize(setup: Setup, items: Sequence[Measurement], records: Records) -> Numbers | None:
    """Accuracies along ε, ε = 0 first."""
    if not items:
        return None
    natural_item, noise = items[0], [item for item in items if item.name.startswith("noise_")]
    attacked = along_pgd(items)
    counts = [records.count(item) for item in (natural_item, *attacked.values())]
    return {
        "eps": [0.0, *attacked],
        "labels": ["0", *(radius_text(radius, setup.config.norm) for radius in attacked)],
        "accuracy": [c.accuracy for c in counts],
        "interval": [list(c.interval) for c in counts],
        "noise": [records.count(item).accuracy for item in (natural_item, *noise)],
        "count": counts[0].total,
        "num_steps": items[1].parameters["num_steps"],
        "judged": setup.config.eps,
        "norm": setup.config.norm,
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
    values = "; ".join(f"{percent(a)} at {label}" for _, label, a, _, _ in near)
    words = f"Accuracy on {counted(numbers['count'], 'image')} around the evaluated ε; the band is a 95 % interval."
    shown = [figure(chart(near, f"{words} Under PGD: {values}."), words)]
    if len(near) < len(columns):
        far = f"The same to the largest ε there is, where accuracy is {percent(columns[-1][2])}."
        shown.append(figure(chart(columns, far), far))
    rows = [[label, percent(a), span(i), percent(n)] for _, label, a, i, n in columns]
    return figures(*shown) + table(
        ["ε", "under PGD", "95 % interval", "under random noise"], rows, numbers=(1, 2, 3),
        caption=f"Accuracy along ε, {counted(numbers['count'], 'image')}",
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
    values = "; ".join(f"{line.label}: " + ", ".join(f"{y:.1f} % at {x:.4g}" for x, y in line.points) for line in lines)
    chart = line_chart(
        lines, f"{words} {values}.", x_label="ε · 255" if unit == 255 else "ε", y_label="accuracy (%)", percent=True,
        x_ticks=[(x, f"{x:.4g}") for x in ticks], x_from=0.0, mark=(unit * eps, f"evaluated at {unit * eps:.4g}"),
    )  # fmt: skip
    return figures(figure(chart, words))


register(Topic(NAME, "Accuracy against ε", measurements, summarize, render, 40, compare=compare))
