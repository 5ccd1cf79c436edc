"""The tables and the two plots of the question what the mutual-information term does, from its records alone."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mimir_fast.reproduction.ablation import CellResult, endings, whole_seeds
from mimir_fast.reproduction.contrasts import LEVEL, Contrast, contrast, holm
from mimir_fast.reproduction.mi_plan import Plan, primary_of, rows_of, secondary_of
from mimir_fast.reproduction.mi_question import Answers, differences
from mimir_fast.reproduction.tables import Spread, accuracies, markdown

MARGIN = 1.0
"""Points of accuracy within which arms are called equivalent."""
ACCURACIES = {"natural": "natural", "pgd20": "PGD-20", "apgd": "APGD"}
MEASURES = {
    "margin": "margin", "share_mean": "share", "nhsic": "nHSIC", "hsic": "HSIC", "cka": "CKA", "delta_r2": "R² of δ",
    "image_r2": "R² of pixels", "rank": "effective rank",
}  # fmt: skip
LATENT = ("hsic", "nhsic", "cka", "image_r2", "rank")
"""Of the measures, those of `latent_facts` that compare rows: `delta_r2` is of each model's own attack."""
TORN = "†"
Named = Mapping[tuple[str, str], Contrast]


def record_of(plan: Plan, answers: Answers) -> dict[str, Any]:
    """All that the tables and plots are made from, as JSON."""
    return {
        "data": plan.data,
        "size": plan.size,
        "chosen": {"lr": answers.lr, "share": answers.share, "budget": answers.budget, "proven": answers.proven},
        "assay_level": plan.level,
        "primary": [list(pair) for pair in primary_of(plan, answers.share)],
        "secondary": [list(pair) for pair in secondary_of(plan, answers.share)],
        "titles": {n: row.title for n, row in rows_of(plan, answers.budget, answers.lr, answers.share).items()},
        "stages": {name: [asdict(cell) for cell in cells] for name, cells in answers.stages.items()},
    }


def contrasts_of(
    cells: Sequence[CellResult], pairs: Sequence[tuple[str, str]], measure: str, level: float = LEVEL
) -> Named:
    """Those of a family, intervals at 1 − level, Holm's correction over all of them."""
    found = {}
    for pair in pairs:
        gaps = differences(cells, *pair, measure)
        if len(gaps) > 1:
            found[pair] = contrast(gaps, margin=MARGIN, level=level)
    corrected = holm({"|".join(pair): c.p for pair, c in found.items()})
    return {pair: replace(c, p_holm=corrected["|".join(pair)]) for pair, c in found.items()}


def cells_in(record: dict[str, Any], stage: str) -> list[CellResult]:
    """The cells of a stage, of seeds that all rows have; [] for one that was not run."""
    return whole_seeds([CellResult(**cell) for cell in record["stages"].get(stage, [])])


def report(record: dict[str, Any]) -> str:
    """Every table in Markdown, with the choices and the verdicts in words."""
    titles, chosen, gate = record["titles"], record["chosen"], record["assay_level"]
    held = "held" if chosen["proven"] else "did NOT hold at any budget"
    looks = "" if gate == LEVEL else f", those of the assay of {100 * (1 - gate):.3g} %, as its gate has them"
    tuning = [CellResult(**c) for name, stage in record["stages"].items() if name.startswith("tuning") for c in stage]
    parts = [
        f"{record['data']}, size {record['size']}. Learning rate {chosen['lr']:g} and share {chosen['share']:g}, by "
        f"held-out training images; the assay {held}; arms at budget {chosen['budget']}. Run at "
        f"{', '.join(_origins(record))}. Mean ± standard deviation over seeds; intervals are of 95 %{looks}. "
        f"{TORN}: 0 is within one of the two intervals; t counts.\n",
        *([f"In the tuning: {ended}\n"] if (ended := endings(tuning)) else []),
    ]
    for stage in (name for name in record["stages"] if name.startswith(("assay", "arms"))):
        cells, assay = cells_in(record, stage), stage.startswith("assay")
        ended = endings([CellResult(**cell) for cell in record["stages"][stage]])
        parts.append(f"## {stage}\n\n" + markdown(_rows(cells, titles), ended))
        families = {f"{name} ": _pairs(record, name) for name in ("primary", "secondary")}
        if assay:
            families = {"": [("adv_mae", "scratch"), ("adv_mae", "noise_mae"), ("adv_mae", "mae")]}
        level = gate if assay else LEVEL
        for family, pairs in families.items():
            for measure in ("pgd20", "apgd", "margin"):
                if found := contrasts_of(cells, pairs, measure, level):
                    parts.append(markdown(_lines(found, cells, titles, measure, family, gate=assay)))
        every = [pair for pairs in families.values() for pair in pairs if "scratch" not in pair]
        parts.append(markdown(_latents(cells, every, titles, level)))
    return "\n".join(parts)


def _pairs(record: dict[str, Any], family: str) -> list[tuple[str, str]]:
    return [(first, second) for first, second in record[family]]


def _origins(record: dict[str, Any]) -> list[str]:
    """Commits and processors that the cells ran on: more than one, and it matters which cells ran where."""
    cells = [cell for stage in record["stages"].values() for cell in stage]
    found = [(str(e.get("commit")), str(e.get("cpu"))) for e in (cell["environment"] for cell in cells)]
    return sorted({f"{commit} on {cpu} ({found.count((commit, cpu))} cells)" for commit, cpu in found})


def _names(cells: Sequence[CellResult], titles: Mapping[str, str]) -> list[str]:
    """Rows in the plan's order: jobs that share the cells end them in any."""
    found = {cell.row for cell in cells}
    return [name for name in titles if name in found]


def _rows(cells: Sequence[CellResult], titles: Mapping[str, str]) -> list[list[str]]:
    lines = [["row", *ACCURACIES.values(), *MEASURES.values(), "seeds"]]
    for name in _names(cells, titles):
        own = [cell for cell in cells if cell.row == name]
        found = [Spread(tuple(accuracies(cells, name, m).values())) for m in ACCURACIES]
        line = [spread.text() if spread.values else "" for spread in found]
        for measure in MEASURES:
            values = Spread(tuple(cell.measures[measure] for cell in own if measure in cell.measures))
            line.append(_minus(f"{values.mean:.3g} ± {values.sd:.1g}") if values.values else "")
        lines.append([titles.get(name, name), *line, str(len(own))])
    return lines


def _lines(
    found: Named, cells: Sequence[CellResult], titles: Mapping[str, str], measure: str, family: str, *, gate: bool
) -> list[list[str]]:
    """A contrast a line. The assay's `gate` asks each interval by itself, so it has neither Holm nor verdict."""
    points = measure in ACCURACIES
    form = "+.2f" if points else "+.3f"
    lines: list[list[str]] = []
    for pair, c in found.items():
        t, bootstrap = (f"{low:{form}} to {high:{form}}" for low, high in (c.interval, c.bootstrap))
        columns = {
            f"{family}{ACCURACIES.get(measure, measure)}: difference": " − ".join(
                titles.get(name, name) for name in pair
            ),
            "mean": _minus(f"{c.mean:{form}}"),
            "relative": _minus(_relative(c.mean, cells, pair[1], measure)) if points else None,
            "interval (t)": _minus(t),
            "interval (bootstrap)": _minus(bootstrap) + TORN * c.torn,
            "p": _p(c.p),
            "p (Holm)": None if gate else _p(c.p_holm),
            f"p (TOST, ±{MARGIN:g})": _p(c.equivalence) if points and not gate else None,
            "verdict": c.verdict if points and not gate else None,
            "pairs": str(c.count),
        }
        shown = {head: text for head, text in columns.items() if text is not None}
        lines += [list(shown.values())] if lines else [list(shown), list(shown.values())]
    return lines


def _relative(difference: float, cells: Sequence[CellResult], row: str, measure: str) -> str:
    """Of the mean of the row that is compared with."""
    base = Spread(tuple(accuracies(cells, row, measure).values())).mean
    return f"{100 * difference / base:+.1f} %" if base else ""


def _latents(
    cells: Sequence[CellResult], pairs: Sequence[tuple[str, str]], titles: Mapping[str, str], level: float
) -> list[list[str]]:
    """What the latents hold, a pair a line: described, so without a test."""
    lines = [["latents: difference, with its interval (t)", *(MEASURES[measure] for measure in LATENT)]]
    found = {measure: contrasts_of(cells, pairs, measure, level) for measure in LATENT}
    for pair in pairs:
        line = [" − ".join(titles.get(name, name) for name in pair)]
        for measure in LATENT:
            c = found[measure].get(pair)
            line.append(_minus(f"{c.mean:+.2g} ({c.interval[0]:+.2g} to {c.interval[1]:+.2g})") if c else "")
        lines.append(line)
    return lines


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def _minus(number: str) -> str:
    return number.replace("-", "−")


def plot_effects(path: Path, record: dict[str, Any]) -> None:
    """The plot that answers: primary contrasts under PGD-20, each seed, mean and interval, over ± the margin."""
    from matplotlib.figure import Figure

    cells, titles = cells_in(record, "arms"), record["titles"]
    found = contrasts_of(cells, _pairs(record, "primary"), "pgd20")
    figure = Figure(figsize=(9, 1.6 + 0.8 * len(found)), dpi=130, layout="constrained")
    axes = figure.subplots()
    axes.axvspan(-MARGIN, MARGIN, color="#dddddd", label=f"equivalent: ±{MARGIN:g} point")
    axes.axvline(0, color="#777777", linewidth=1)
    for place, (pair, c) in enumerate(found.items()):
        _seeds(axes, place, differences(cells, *pair, "pgd20"), c, "#1f5fa8")
    names = [f"{titles.get(first, first)}\nminus {titles.get(second, second)}" for first, second in found]
    axes.set_yticks(range(len(found)), names, fontsize=8)
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_xlabel("difference of PGD-20 accuracy in points, paired by seed; bars: 95 % interval")
    axes.legend(fontsize=8, loc="best")
    figure.savefig(path)


def _seeds(axes: Any, place: int, gaps: Sequence[float], c: Contrast, color: str) -> None:
    """A line of a plot: a pale dot a seed, the mean and its interval."""
    axes.plot(gaps, [place] * len(gaps), "o", color=color, alpha=0.3, markersize=4)
    low, high = c.interval
    axes.errorbar(c.mean, place, xerr=[[c.mean - low], [high - c.mean]], fmt="o", color=color, capsize=4)


def plot_why(path: Path, record: dict[str, Any]) -> None:
    """What the latents of the arms hold beside arm (a)'s: each seed, mean and 95 % interval."""
    from matplotlib.figure import Figure

    cells, titles = cells_in(record, "arms"), record["titles"]
    names = [name for name in _names(cells, titles) if name != "adv_mae"]
    figure = Figure(figsize=(13, 1.4 + 0.5 * len(names)), dpi=130, layout="constrained")
    for axes, measure in zip(figure.subplots(1, len(LATENT), sharey=True), LATENT, strict=True):
        axes.axvline(0, color="#777777", linewidth=1)
        for pair, c in contrasts_of(cells, [(name, "adv_mae") for name in names], measure).items():
            _seeds(axes, names.index(pair[0]), differences(cells, *pair, measure), c, "#b3372f")
        axes.set_title(MEASURES[measure], fontsize=10)
        axes.grid(axis="x", alpha=0.3)
        axes.tick_params(axis="x", labelsize=8)
        axes.locator_params(axis="x", nbins=3)
        axes.set_yticks(range(len(names)), [titles.get(name, name) for name in names], fontsize=8)
        axes.set_ylim(len(names) - 0.5, -0.5)
    figure.supxlabel("difference from (a) adv-MAE without a penalty, paired by seed; bars: 95 % interval", fontsize=9)
    figure.savefig(path)
