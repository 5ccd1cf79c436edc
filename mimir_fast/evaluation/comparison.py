"""Several evaluations side by side: one table, paired differences with intervals, figures of the topics.

Models evaluated on the same images are compared image by image: the difference of two robust accuracies is then far
more certain than their intervals, because what is hard for one model is hard for the other. Nothing is measured here;
everything comes from results.json.
"""

import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, TypeVar

from mimir_fast.evaluation.html import page, paragraph, percent, span, table
from mimir_fast.evaluation.measure import UNBROKEN
from mimir_fast.evaluation.options import NORM_NAMES
from mimir_fast.evaluation.results import WORST, Results
from mimir_fast.evaluation.statistics import mcnemar_two_sided, paired_difference
from mimir_fast.evaluation.topic import Column, all_topics
from mimir_fast.validation import counted

S = TypeVar("S")

PUBLISHED = Path(__file__).with_name("robustbench.json")
PUBLISHED_HEAD = ["RobustBench", "architecture", "natural", "AutoAttack", "best known attack"]


@dataclass
class Evaluation:
    """One evaluation, under the name it bears in the tables."""

    name: str
    path: Path
    results: Results

    @property
    def broken_by(self) -> dict[str, str]:
        """Image → what broke it; an image is known by its digest, and by how many equal ones came before it."""
        known, seen, found = self.results.images.get("digests", {}), Counter[str](), dict[str, str]()
        for sample, name in self.results.sections["accuracy"]["broken_by"].items():
            if sample in known:
                found[f"{known[sample]}.{seen[known[sample]]}"] = name
                seen[known[sample]] += 1
        return found

    @property
    def robust(self) -> dict[str, bool]:
        """Image → right under every attack that ran on all images."""
        return {image: name == UNBROKEN for image, name in self.broken_by.items()}

    @property
    def correct(self) -> dict[str, bool]:
        """Image → right without attack."""
        return {image: name != "clean" for image, name in self.broken_by.items()}

    @property
    def faced(self) -> dict[str, dict[str, Any]]:
        """The attacks that ran on all images, with their parameters; without seeds, and by whose code AutoAttack ran:
        they make no attack weaker."""
        return {
            label: {name: value for name, value in parameters.items() if name not in ("seed", "by")}
            for label, parameters in self.results.sections["accuracy"]["faced"].items()
        }


@dataclass(frozen=True)
class Difference:
    """Paired comparison of a model with the first one.

    Attributes:
        only_first, only_other: images only one of the two has right.
        total: images both were evaluated on.
    """

    measure: str
    name: str
    only_first: int
    only_other: int
    total: int

    @property
    def interval(self) -> tuple[float, float, float]:
        """(other less first, low, high), 95 %."""
        return paired_difference(self.only_other, self.only_first, self.total)

    @property
    def p(self) -> float:
        """Two-sided p value of the exact McNemar test."""
        return mcnemar_two_sided(self.only_first, self.only_other)

    @classmethod
    def of(cls, measure: str, name: str, mine: Mapping[S, bool], theirs: Mapping[S, bool]) -> "Difference | None":
        """From who is right on which image, the first model's and the other's; None without a common image.

        Args:
            measure: what is compared.
            name: of the other model.
        """
        common = set(mine) & set(theirs)
        only_first = sum(mine[s] and not theirs[s] for s in common)
        only_other = sum(theirs[s] and not mine[s] for s in common)
        return cls(measure, name, only_first, only_other, len(common)) if common else None


def find_results(path: Path) -> Path:
    """results.json: the file, its folder, or the newest evaluation in a run's folder, else its probing.

    Raises:
        FileNotFoundError: there is none.
    """
    if path.is_file():
        return path
    if (path / "results.json").is_file():
        return path / "results.json"
    found = sorted(path.glob("evaluation/*/results.json"), key=lambda p: p.stat().st_mtime)
    found = found or list(path.glob("probing/results.json"))
    if not found:
        raise FileNotFoundError(
            f"{path} holds no results.json: evaluate it first (python -m mimir_fast.evaluate --checkpoint "
            f"{shlex.quote(str(path))})"
        )
    return found[-1]


def load(paths: Sequence[str | Path]) -> list[Evaluation]:
    """The evaluations, named by what tells them apart.

    Raises:
        FileNotFoundError, ValueError: there is no such evaluation, it is of another version, or it has no result.
    """
    files = [find_results(Path(path)) for path in paths]
    read = [Results.read(file) for file in files]
    if empty := [str(file) for file, results in zip(files, read, strict=True) if "accuracy" not in results.sections]:
        raise ValueError(f"{empty[0]} holds no accuracies: its section failed; evaluate the model again")
    names = told_apart([results.choices for results in read], files)
    return [Evaluation(n, f, r) for n, f, r in zip(names, files, read, strict=True)]


def told_apart(choices: Sequence[Mapping[str, Any]], files: Sequence[Path]) -> list[str]:
    """The models of several results.json by what was judged or, where that is one model twice, by the folders."""
    names = [str(one["checkpoint"]) for one in choices]
    return names if len(set(names)) == len(names) else [str(file.parent) for file in files]


def warnings(evaluations: Sequence[Evaluation]) -> list[str]:
    """What makes the numbers incomparable."""
    first, found = evaluations[0], []
    for other in evaluations[1:]:
        if reason := not_paired(first, other):
            found.append(f"{other.name} and {first.name} {reason}: shown side by side, not tested against each other.")
            continue
        mine, theirs = set(first.correct), set(other.correct)
        if mine != theirs:
            found.append(
                f"{other.name} and {first.name} share {counted(len(mine & theirs), 'image')}; nothing else is compared."
            )
        if reason := not_equally_attacked(first, other):
            found.append(
                f"{other.name} and {first.name} {reason}: their robust accuracies are not equally strict, and are "
                "shown but not tested against each other."
            )
    for one in evaluations:
        if one.results.verdicts["validity"]["kind"] == "bad":
            found.append(f"{one.name}: {one.results.verdicts['validity']['text']}")
    return found


def not_paired(first: Evaluation, other: Evaluation) -> str:
    """Why no image can be compared, "" where some can: images are the same where their pixels and labels are."""
    if other.results.images["classes"] != first.results.images["classes"]:
        return f"have {other.results.images['classes']} and {first.results.images['classes']} classes to choose from"
    if not set(first.correct) & set(other.correct):
        return f"have no image in common ({other.results.images['source']}, {first.results.images['source']})"
    return ""


def not_equally_attacked(first: Evaluation, other: Evaluation) -> str:
    """Why robust accuracies cannot be compared, "" where they can."""
    if other.results.ball != first.results.ball:
        return f"were attacked in other balls ({other.results.ball}; {first.results.ball}), which is not comparable"
    mine, theirs = first.faced, other.faced
    if alone := sorted(mine.keys() ^ theirs.keys()):
        return f"faced different attacks on all their images (only one of them {'; '.join(alone)})"
    differing = [
        f"{label}: {name} {theirs[label].get(name)} and {mine[label].get(name)}"
        for label in mine
        for name in sorted(mine[label].keys() | theirs[label].keys())
        if mine[label].get(name) != theirs[label].get(name)
    ]
    return f"faced attacks with other parameters ({'; '.join(differing)})" if differing else ""


def differences(evaluations: Sequence[Evaluation]) -> list[Difference]:
    """Every other model against the first, on the images both saw: without attack, and in the worst case where both
    faced the same attacks."""
    first, found = evaluations[0], []
    for other in evaluations[1:]:
        if not_paired(first, other):
            continue
        pairs = [("no attack", first.correct, other.correct)]
        if first.results.attacked and not not_equally_attacked(first, other):
            pairs.append((WORST, first.robust, other.robust))
        found += [d for pair in pairs if (d := Difference.of(pair[0], other.name, *pair[1:]))]
    return found


def main_table(evaluations: Sequence[Evaluation]) -> list[list[str]]:
    """Head and one line a model."""
    rows: list[dict[str, Column]] = [{} for _ in evaluations]
    labels: dict[str, str] = {}
    for topic in all_topics():
        for row, one in zip(rows, evaluations, strict=True):
            if topic.name in one.results.sections:
                row |= {c.key: c for c in topic.columns(one.results.sections[topic.name]) if c.key}
                for key, column in row.items():
                    labels.setdefault(key, column.label)

    def cell(column: Column | None) -> str:
        few = f" of {column.total}" if column and column.total is not None else ""
        return percent(column.accuracy) + few if column else ""

    partial = [[f"{percent(part['accuracy'])} of {part['total']}" for part in e.results.partial] for e in evaluations]
    more = ["with attacks on fewer images"] if any(partial) else []
    lines = [["model", "images", "ball", *labels.values(), WORST, "95 % interval", *more, "checks"]]
    for row, one, fewer in zip(rows, evaluations, partial, strict=True):
        robust = one.results.robust
        worst = [percent(robust["accuracy"]), span(robust["interval"])] if one.results.attacked else ["", ""]
        lines.append([one.name, str(robust["total"]), one.results.ball, *(cell(row.get(key)) for key in labels), *worst,
                      *(["; ".join(fewer)] if more else []), one.results.verdicts["validity"]["large"]])  # fmt: skip
    return lines


def difference_table(first: str, found: Sequence[Difference]) -> list[list[str]]:
    """Head and one line a model and measure; empty when nothing can be paired.

    Args:
        first: the name of the first model.
    """
    lines = [["compared with " + first, "measure", "difference", "95 % interval", "p", "images",
              "only the first correct", "only this one correct"]]  # fmt: skip
    for d in found:
        value, low, high = d.interval
        lines.append(
            [d.name, d.measure, f"{100 * value:+.1f}", f"{100 * low:+.1f} to {100 * high:+.1f}",
             "< 0.001" if d.p < 0.001 else f"{d.p:.2g}", str(d.total), str(d.only_first), str(d.only_other)]
        )  # fmt: skip
    return lines if len(lines) > 1 else []


def published_rows(results: Results, limit: int = 10) -> list[list[str]]:
    """Models of RobustBench for the same data, norm and radius, in its order: by accuracy under the best known attack.

    Empty where it has none.
    """
    known = json.loads(PUBLISHED.read_text())
    numbers = results.sections["accuracy"]
    norm = NORM_NAMES[numbers["norm"]]
    entries = [
        e for e in known["models"]
        if e["data"] == results.images["source"] and e["norm"] == norm and e["eps"] == numbers["eps_text"]
    ]  # fmt: skip
    entries.sort(key=lambda e: -e.get("best_known", e["autoattack"]))
    return [
        [e["name"], e["architecture"],
         *(f"{v:.2f} %" for v in (e["clean"], e["autoattack"], e.get("best_known", e["autoattack"])))]
        for e in entries[:limit]
    ]  # fmt: skip


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Head and rows as Markdown."""
    head, *body = lines
    rows = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows) + "\n"


def html_differences(first: str, found: Sequence[Difference]) -> list[str]:
    """Heading and table of paired differences with the first model; nothing where there are none."""
    if not (lines := difference_table(first, found)):
        return []
    head, *body = lines
    caption = "In percentage points, of the same images: exact McNemar test, Bonett and Price's interval"
    return ["<h2>Differences</h2>", table(head, body, numbers=range(2, len(head)), caption=caption)]


def markdown(evaluations: Sequence[Evaluation]) -> str:
    """The tables for a README or an issue."""
    parts = [markdown_table(main_table(evaluations))]
    if found := difference_table(evaluations[0].name, differences(evaluations)):
        parts.append(markdown_table(found))
    if rows := published_rows(evaluations[0].results):
        parts.append(markdown_table([PUBLISHED_HEAD, *rows]) + f"\n{_published_words()}\n")
    parts += [f"- {warning}\n" for warning in warnings(evaluations)]
    return "\n".join(parts)


def html(evaluations: Sequence[Evaluation]) -> str:
    """The page: warnings, accuracies, paired differences, figures of the topics, published models."""
    few = ", ".join(one.name for one in evaluations)
    title = f"Comparison: {few}" if len(few) <= 80 else f"Comparison of {len(evaluations)} models"
    head, *body = main_table(evaluations)
    numbers = [i for i in range(1, len(head) - 1) if i != 2]
    parts = [
        f"<h1>{escape(title)}</h1>",
        *(paragraph(warning, "note") for warning in warnings(evaluations)),
        "<h2>Accuracy</h2>",
        table(head, body, numbers=numbers, caption="Wilson intervals"),
    ]
    parts += html_differences(evaluations[0].name, differences(evaluations))
    for topic in all_topics():
        models = [(e.name, e.results.sections[topic.name]) for e in evaluations if topic.name in e.results.sections]
        if models and (shown := topic.compare(models)):
            parts += [f"<h2>{escape(topic.title)}</h2>", shown]
    if rows := published_rows(evaluations[0].results):
        parts += ["<h2>Published models</h2>", paragraph(_published_words()),
                  table(PUBLISHED_HEAD, rows, numbers=(2, 3, 4))]  # fmt: skip
    data: dict[str, Any] = {one.name: str(one.path) for one in evaluations}
    return page(title, "\n".join(parts), {"compared": data}, wide=True)


def _published_words() -> str:
    known = json.loads(PUBLISHED.read_text())
    return (
        f"The most robust models of RobustBench for this data and ball ({known['source']}), on its own test images: "
        "all 10,000 of CIFAR, 5000 of ImageNet. Compare AutoAttack with AutoAttack; the last column is lower where an "
        "attack made for the model breaks more."
    )
