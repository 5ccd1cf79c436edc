"""Which images are misclassified: per class, into which class, to which attack, and by what margin.

Confusions and margins under attack: each image as that attack left it that gave it the lowest margin, of those whose
margins are recorded for every image (AutoAttack's are not). Nothing is measured for this.
"""

from collections import Counter
from collections.abc import Sequence
from html import escape
from typing import Any

from mimir_fast.evaluation.charts import LEFT, SERIES, TOP, Plane, bars, nice_ticks, svg, thinned
from mimir_fast.evaluation.html import figure, figures, paragraph, percent, table
from mimir_fast.evaluation.measure import UNBROKEN, Measurement, Records
from mimir_fast.evaluation.statistics import Count
from mimir_fast.evaluation.topic import Numbers, Setup, Topic, register
from mimir_fast.evaluation.topics import accuracy
from mimir_fast.validation import counted

MOST_CLASSES = 20


def summarize(setup: Setup, items: Sequence[Measurement], records: Records) -> Numbers | None:
    """Per-class counts, confusions, how many images each attack broke first, and the margins; None without attack."""
    if not accuracy.faced_by(records)[0]:
        return None
    broken = accuracy.broken_by(records)
    clean = records.rows(next(item for item in records.items(accuracy.NAME) if item.name == "natural"))
    samples = [str(s) for s in clean["sample"]]
    labels = clean["label"]
    worst, worst_of = list(zip(clean["margin"], clean["prediction"], strict=True)), []
    for item in records.items():
        if item.in_ball and item.images == "all" and "margin" in (rows := records.rows(item)):
            worst_of.append(item.label or item.name)
            found = zip(rows["margin"], rows["prediction"], strict=True)
            worst = [min(a, b, key=lambda pair: pair[0]) for a, b in zip(worst, found, strict=True)]
    per_class: dict[str, Any] = {}
    for number, name in enumerate(setup.classes):
        mine = [i for i, label in enumerate(labels) if label == number]
        if mine:
            robust = sum(broken[samples[i]] == UNBROKEN for i in mine)
            right = sum(broken[samples[i]] != "clean" for i in mine)
            per_class[name] = {"clean": right, "robust": robust, "total": len(mine)}
    confusions = Counter(
        (setup.classes[label], setup.class_name(seen))
        for label, (_, seen) in zip(labels, worst, strict=True)
        if label != seen
    )
    names = {item.name: item.label or item.name for item in records.items()} | {"clean": "wrong without attack"}
    return {
        "per_class": per_class,
        "confusions": [[a, b, n] for (a, b), n in confusions.most_common(None if len(per_class) <= 12 else 20)],
        "harvest": [[names.get(n, n), k] for n, k in Counter(broken.values()).most_common() if n != UNBROKEN],
        "standing": sum(name == UNBROKEN for name in broken.values()),
        "total": len(broken),
        "worst_of": worst_of,
        "margins": {"clean": clean["margin"], "attacked": [float(m) for m, _ in worst]},
    }


def render(numbers: Numbers) -> str:
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
    of = f"each image as the worst of these left it: {', '.join(numbers.get('worst_of', ['the first table']))}"
    caption = (
        "Margins, the logit of the true class less the largest other: an image is misclassified left of zero, "
        f"{below} of {len(margins['attacked'])} under attack ({of})."
    )
    both = [("without attack", margins["clean"]), ("under the worst attack", margins["attacked"])]
    charts = figures(
        figure(bars(values, words, x_label="robust accuracy (%)"), words),
        figure(histogram(both, caption, x_label="margin"), caption),
    )
    rows = [[name, str(n), percent(n / numbers["total"])] for name, n in numbers["harvest"]]
    rows.append(["none: robust", str(numbers["standing"]), percent(numbers["standing"] / numbers["total"])])
    caption = "Which attack broke which image, in the order they ran; results.json names the images"
    tables = table(["first broken by", "images", "share"], rows, numbers=(1, 2), caption=caption)
    return charts + tables + _confusion(numbers, of)


def _confusion(numbers: Numbers, of: str) -> str:
    confusions, names = numbers["confusions"], list(numbers["per_class"])
    if not confusions:
        return paragraph(f"No image is misclassified ({of}).")
    if len(names) > 12:
        rows = [[f"{a} → {b}", str(n)] for a, b, n in confusions]
        return table(
            ["taken for", "images"], rows, numbers=(1,), caption=f"Most frequent confusions under attack ({of})"
        )
    counts = {(a, b): n for a, b, n in confusions}
    seen = names + sorted({b for _, b, _ in confusions} - set(names))
    rows = [[a, *(str(counts.get((a, b), "")) if a != b else "·" for b in seen)] for a in names]
    caption = f"Confusion under attack: images of the row's class that are taken for the column's ({of})"
    return table(["class", *seen], rows, numbers=range(1, len(seen) + 1), caption=caption)


def histogram(
    series: Sequence[tuple[str, Sequence[float]]], words: str, *, x_label: str, num_bins: int = 24
) -> str:  # fmt: skip
    """Overlaid counts of several samples in common bins, with zero marked where it is inside."""
    values = sorted(v for _, sample in series for v in sample)
    cut = max(1, len(values) // 100)  # a handful of outliers would flatten the rest
    low, high = values[cut - 1], values[-cut]
    if high <= low:
        low, high = low - 0.5, high + 0.5
    width = (high - low) / num_bins
    counts = []
    for _, sample in series:
        bins = [0] * num_bins
        for v in sample:
            bins[min(max(int((v - low) / width), 0), num_bins - 1)] += 1
        counts.append(bins)
    plane = Plane((low, high), (0, 1.05 * max(max(b) for b in counts)))
    body = [plane.axes(x_label, "images", thinned(nice_ticks(low, high), plane), nice_ticks(*plane.y_range, 4))]
    for number, ((label, _), bins) in enumerate(zip(series, counts, strict=True)):
        for index, count in enumerate(bins):
            if not count:
                continue
            a, b = low + index * width, low + (index + 1) * width
            x, y = plane.x(a), plane.y(count)
            body.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{plane.x(b) - x - 0.6:.1f}" height="{plane.y(0) - y:.1f}" '
                f'fill="{SERIES[number]}" opacity=".6"><title>{escape(label)}: {counted(count, "image")} from '
                f"{a:.3g} to {b:.3g}</title></rect>"
            )
        y = 316 + 20 * number
        body.append(f'<rect x="{LEFT + 3}" y="{y - 10}" width="11" height="11" fill="{SERIES[number]}" opacity=".6"/>')
        body.append(f'<text x="{LEFT + 22}" y="{y}">{escape(label)}</text>')
    if low < 0 < high:
        x = plane.x(0)
        body.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{plane.y(0):.1f}"/>')
    return svg("".join(body), 304 + 20 * len(series), words)


register(Topic("classes", "Which images are misclassified", lambda setup: [], summarize, render, 50))
