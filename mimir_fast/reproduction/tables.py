"""From finished cells to a table, as Markdown and on the terminal, and one plot.

Mean ± sample standard deviation over seeds, in per cent. All cells are judged on the same test images, so differences
between rows are paired by seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from mimir_fast.reproduction.ablation import Ablation, CellResult, Row

MEASURES = ("natural", "pgd20", "autoattack")
COLOURS = {"natural": "#777777", "pgd20": "#1f5fa8", "autoattack": "#b3372f"}


@dataclass(frozen=True)
class Spread:
    """Values of one quantity over seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean of the accuracies over the seeds."""
        return mean(self.values)

    @property
    def sd(self) -> float:
        """Sample standard deviation; 0 for a single value."""
        return stdev(self.values) if len(self.values) > 1 else 0.0

    def text(self, sign: str = "") -> str:
        """`81.2 ± 0.4`, or without the spread when there is one value only."""
        spread = f" ± {self.sd:.1f}" if len(self.values) > 1 else ""
        return f"{self.mean:{sign}.1f}{spread}"


def accuracies(results: Sequence[CellResult], row: str, measure: str) -> dict[int, float]:
    """Seed → accuracy in per cent."""
    return {
        r.seed: 100 * r.accuracy[measure][0] / r.accuracy[measure][1]
        for r in results
        if r.row == row and measure in r.accuracy
    }


def paired(results: Sequence[CellResult], row: str, baseline: str, measure: str) -> Spread | None:
    """Differences of two rows over the seeds both have; None when there is none."""
    ours, theirs = accuracies(results, row, measure), accuracies(results, baseline, measure)
    common = sorted(set(ours) & set(theirs))
    return Spread(tuple(ours[s] - theirs[s] for s in common)) if common else None


def table(ablation: Ablation, results: Sequence[CellResult], baseline: str = "adv_mae") -> list[list[str]]:
    """Head and lines, as text; rows without results are left out."""
    titles = {"natural": "natural", "pgd20": "PGD-20", "autoattack": ablation.rules.autoattack_title}
    lines = [
        [
            "pre-training",
            "‖λ∇I‖/‖∇MSE‖ start → end",
            *(titles[m] for m in MEASURES),
            "PGD-20 − adv-MAE",
            "seeds",
            "paper",
        ]
    ]
    for row in ablation.rows:
        found = {m: accuracies(results, row.name, m) for m in MEASURES}
        if not found["natural"]:
            continue
        cells = [Spread(tuple(v.values())).text() if v else "" for v in found.values()]
        gap = paired(results, row.name, baseline, "pgd20") if row.name != baseline else None
        lines.append(
            [row.title, _share(results, row), *cells, gap.text("+") if gap else "", str(len(found["natural"])),
             row.published]
        )  # fmt: skip
    return lines


def _share(results: Sequence[CellResult], row: Row) -> str:
    shares = [r.share for r in results if r.row == row.name and r.share]
    return " → ".join(f"{mean(s[when] for s in shares):.0e}" for when in ("init", "trained")) if shares else ""


def markdown(lines: Sequence[Sequence[str]], note: str = "") -> str:
    """A GitHub table with the note under it."""
    head, *body = lines
    rows = [head, ["---"] * len(head), *body]
    text = "\n".join("| " + " | ".join(line) + " |" for line in rows) + "\n"
    return text + (f"\n{note}\n" if note else "")


def print_table(lines: Sequence[Sequence[str]]) -> None:
    """Print the table on the terminal."""
    from rich.console import Console
    from rich.table import Table

    head, *body = lines
    shown = Table(*head)
    for line in body:
        shown.add_row(*line)
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    console.print(shown)


def plot(path: Path, ablation: Ablation, results: Sequence[CellResult]) -> None:
    """Accuracies of all rows: a dot a seed, mean and standard deviation, best read from the top."""
    from matplotlib.figure import Figure

    rows = [row for row in ablation.rows if accuracies(results, row.name, "natural")]
    titles = {"natural": "natural", "pgd20": "PGD-20", "autoattack": ablation.rules.autoattack_title}
    figure = Figure(figsize=(9.5, 1.2 + 0.42 * len(rows)), dpi=130, layout="constrained")
    panels = figure.subplots(1, len(MEASURES), sharey=True)
    for axes, measure in zip(panels, MEASURES, strict=True):
        for place, row in enumerate(rows):
            values = tuple(accuracies(results, row.name, measure).values())
            if not values:
                continue
            spread = Spread(values)
            axes.plot(values, [place] * len(values), "o", color=COLOURS[measure], alpha=0.3, markersize=4)
            axes.errorbar(spread.mean, place, xerr=spread.sd, fmt="o", color=COLOURS[measure], capsize=3)
        axes.set_title(titles[measure], fontsize=11)
        axes.set_xlabel("accuracy (%)")
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(rows)), [row.title for row in rows])
    panels[0].invert_yaxis()
    figure.savefig(path)
