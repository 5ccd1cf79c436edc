"""Which images are misclassified: per class, into which class, to which attack, and by what margin.

Under attack means: each image as the attack of the lowest margin left it.
"""

from collections import Counter
from typing import Any

from mimir_fast.evaluation.charts import bars, histogram
from mimir_fast.evaluation.html import figure, figures, paragraph, percent, table
from mimir_fast.evaluation.measure import Count, Measurement, Records
from mimir_fast.evaluation.plan import Setup
from mimir_fast.evaluation.sections import accuracy

NAME, TITLE = "classes", "Which images are misclassified"
MOST_CLASSES = 20


def measurements(setup: Setup) -> list[Measurement]:
    """None of its own: it reads those of the first table."""
    return []


def summarize(setup: Setup, records: Records) -> dict[str, Any]:
    """Per-class counts, confusions, the attacks' harvest and the margins."""
    broken = accuracy.broken_by(records)
    attacks = [item for item in accuracy.measurements(setup) if item.breaks]
    clean = records.rows(next(item for item in accuracy.measurements(setup) if item.name == "natural"))
    samples = [str(s) for s in clean["sample"]]
    labels = clean["label"]
    worst = list(zip(clean["margin"], clean["prediction"], strict=True))
    for item in attacks:
        rows = records.rows(item)
        found = zip(rows["margin"], rows["prediction"], strict=True)
        worst = [min(a, b, key=lambda pair: pair[0]) for a, b in zip(worst, found, strict=True)]
    per_class: dict[str, Any] = {}
    for number, name in enumerate(setup.classes):
        mine = [i for i, label in enumerate(labels) if label == number]
        if mine:
            standing = sum(broken[samples[i]] == accuracy.STANDS for i in mine)
            right = sum(broken[samples[i]] != "clean" for i in mine)
            per_class[name] = {"clean": right, "robust": standing, "total": len(mine)}
    confusions = Counter(
        (setup.classes[label], setup.classes[seen])
        for label, (_, seen) in zip(labels, worst, strict=True)
        if label != seen
    )
    names = {item.name: item.label or item.name for item in records.plan} | {"clean": "wrong without attack"}
    return {
        "per_class": per_class,
        "confusions": [[a, b, n] for (a, b), n in confusions.most_common(None if len(per_class) <= 12 else 20)],
        "harvest": [[names.get(n, n), k] for n, k in Counter(broken.values()).most_common() if n != accuracy.STANDS],
        "standing": sum(name == accuracy.STANDS for name in broken.values()),
        "total": len(broken),
        "margins": {"clean": clean["margin"], "attacked": [float(m) for m, _ in worst]},
    }


def render(numbers: dict[str, Any]) -> str:
    """A figure and a table of each."""
    per_class = numbers["per_class"]
    order = sorted(per_class.items(), key=lambda pair: pair[1]["robust"] / pair[1]["total"])
    shown = order if len(order) <= MOST_CLASSES else order[: MOST_CLASSES // 2] + order[-MOST_CLASSES // 2 :]
    values = []
    for name, entry in shown:
        count = Count(entry["robust"], entry["total"])
        low, high = count.interval
        values.append((name, round(100 * count.accuracy, 1), (100 * low, 100 * high)))
    worst, best = shown[0], shown[-1]
    words = (
        f"Robust accuracy of each class, 95 % intervals: least {worst[0]} "
        f"({percent(worst[1]['robust'] / worst[1]['total'])}), most {best[0]} "
        f"({percent(best[1]['robust'] / best[1]['total'])})."
    )
    if len(order) > len(shown):
        words += f" The {len(shown) // 2} least and most robust of {len(order)} classes."
    margins = numbers["margins"]
    below = sum(m < 0 for m in margins["attacked"])
    said = (
        "Margins, the logit of the true class less the largest other: an image is misclassified left of zero, "
        f"{below} of {len(margins['attacked'])} under attack."
    )
    both = [("without attack", margins["clean"]), ("under the worst attack", margins["attacked"])]
    charts = figures(
        figure(bars(values, words, x_label="robust accuracy (%)"), words),
        figure(histogram(both, said, x_label="margin"), said),
    )
    harvest = [[name, str(n), percent(n / numbers["total"])] for name, n in numbers["harvest"]]
    harvest.append(["none: robust", str(numbers["standing"]), percent(numbers["standing"] / numbers["total"])])
    said = "Which attack broke which image, in the order they ran; results.json names the images"
    tables = table(["first broken by", "images", "share"], harvest, numbers=(1, 2), caption=said)
    return charts + tables + _confusion(numbers)


def _confusion(numbers: dict[str, Any]) -> str:
    confusions, names = numbers["confusions"], list(numbers["per_class"])
    if not confusions:
        return paragraph("No image is misclassified under attack.")
    if len(names) > 12:
        rows = [[f"{a} → {b}", str(n)] for a, b, n in confusions]
        return table(["taken for", "images"], rows, numbers=(1,), caption="Most frequent confusions under attack")
    counts = {(a, b): n for a, b, n in confusions}
    seen = names + sorted({b for _, b, _ in confusions} - set(names))
    rows = [[a, *(str(counts.get((a, b), "")) if a != b else "·" for b in seen)] for a in names]
    said = "Confusion under attack: images of the row's class that are taken for the column's"
    return table(["class", *seen], rows, numbers=range(1, len(seen) + 1), caption=said)
