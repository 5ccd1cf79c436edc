"""Accuracy against ε, under PGD and under random noise of the same size, on the images of the checks."""

from typing import Any

from mimir_fast.evaluation.attacks import make_pgd, make_random_noise, natural
from mimir_fast.evaluation.charts import Line, line_chart
from mimir_fast.evaluation.config import NORM_WORDS, radius_text
from mimir_fast.evaluation.html import figure, figures, percent, span, table
from mimir_fast.evaluation.measure import Count, Measurement, Records
from mimir_fast.evaluation.plan import Setup

NAME, TITLE = "curve", "Accuracy against ε"


def along(setup: Setup, radius: float) -> Measurement:
    """PGD at a radius."""
    key = radius_text(radius, setup.config.norm).replace("/", "_")
    attack = make_pgd(setup.config, setup.config.settings.curve_steps, radius, restarts=1)
    return attack.on(setup.few, f"curve_{key}")


def noise(setup: Setup, radius: float) -> Measurement:
    """Random noise at a radius."""
    key = radius_text(radius, setup.config.norm).replace("/", "_")
    return make_random_noise(setup.config, radius).on(setup.few, f"noise_{key}")


def measurements(setup: Setup) -> list[Measurement]:
    """Both, at every radius."""
    radii = setup.curve_radii()
    if not radii:
        return []
    return [natural().on(setup.few, "check_natural"), *(make(setup, r) for r in radii for make in (along, noise))]


def summarize(setup: Setup, records: Records) -> dict[str, Any] | None:
    """Accuracies along ε, ε = 0 first."""
    if not setup.config.settings.check_images:
        return None
    radii = setup.curve_radii()
    start = records.count(natural().on(setup.few, "check_natural"))

    def counts(make: Any) -> list[Count]:
        return [start, *(records.count(make(setup, radius)) for radius in radii)]

    under, beside = counts(along), counts(noise)
    return {
        "eps": [0.0, *radii],
        "labels": ["0", *(radius_text(radius, setup.config.norm) for radius in radii)],
        "accuracy": [c.accuracy for c in under],
        "interval": [list(c.interval) for c in under],
        "noise": [c.accuracy for c in beside],
        "count": start.total,
        "num_steps": setup.config.settings.curve_steps,
        "judged": setup.config.eps,
        "norm": setup.config.norm,
    }


def render(numbers: dict[str, Any]) -> str:
    """Two figures to scale, one around the judged ε and one to where no model can stand, and the numbers."""
    columns = list(
        zip(numbers["eps"], numbers["labels"], numbers["accuracy"], numbers["interval"], numbers["noise"], strict=True)
    )
    unit = 255 if numbers["norm"] == "linf" else 1
    axis = "ε · 255" if unit == 255 else f"ε ({NORM_WORDS[numbers['norm']]})"
    judged = unit * numbers["judged"]

    def chart(rows: list[Any], words: str) -> str:
        lines = [
            Line(f"under PGD-{numbers['num_steps']}", [(unit * e, 100 * a) for e, _, a, _, _ in rows],
                 [(100 * low, 100 * high) for _, _, _, (low, high), _ in rows]),
            Line("under random noise", [(unit * e, 100 * n) for e, _, _, _, n in rows]),
        ]  # fmt: skip
        return line_chart(
            lines, words, x_label=axis, y_label="accuracy (%)", percent=True, x_from=0.0,
            x_ticks=[(unit * e, f"{unit * e:.4g}") for e, *_ in rows], mark=(judged, f"evaluated at {judged:.4g}"),
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
