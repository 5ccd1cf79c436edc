"""Certified accuracy of the smoothed classifier: a lower bound in L2, where every attack gives an upper one."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from mimir_fast.evaluation.charts import Line, line_chart
from mimir_fast.evaluation.html import figure, figures, paragraph, percent, span, table
from mimir_fast.evaluation.images import EvaluationImages
from mimir_fast.evaluation.journal import Journal
from mimir_fast.evaluation.measure import Measurement, Outcome, Records, Row, ShardRun
from mimir_fast.evaluation.smoothing import certified_radius, smoothed_answer
from mimir_fast.evaluation.statistics import Count
from mimir_fast.evaluation.topic import Column, Numbers, Setup, Topic, options_of, register
from mimir_fast.validation import check_number, without

POINTS = 40
"""Of the curve."""
DEPENDENT = "smoothing_images", "smoothing_select", "smoothing_draws", "smoothing_alpha", "smoothing_radii"


@dataclass
class SmoothingOptions:
    """Randomised smoothing: which noise, how many draws."""

    smoothing: tuple[float, ...] = ()
    """Certify the model smoothed by Gaussian noise (Cohen et al.) of these standard deviations, for images in [0, 1],
    such as 0.25, which it should be trained with; left out: nothing is certified."""
    smoothing_images: int = 500
    """Certify that many of the images, evenly spaced."""
    smoothing_select: int = 100
    """Draws of the noise that choose the class of an image."""
    smoothing_draws: int = 100_000
    """Draws that certify it; each is a pass through the model. The largest radius there is grows with them."""
    smoothing_alpha: float = 0.001
    """A certificate of an image is wrong with at most this probability."""
    smoothing_radii: tuple[float, ...] = ()
    """L2 radii at which the certified accuracy is given; left out: 0, σ, 2σ, … up to the largest there is."""

    def __post_init__(self) -> None:
        for sigma in self.smoothing:
            check_number("smoothing", sigma, above=0, hint="a standard deviation for images in [0, 1], such as 0.25")
        for name in ("smoothing_images", "smoothing_select", "smoothing_draws"):
            check_number(name, getattr(self, name), at_least=1, below=2**31)
        check_number("smoothing_alpha", self.smoothing_alpha, above=0, below=0.5)
        for radius in self.smoothing_radii:
            check_number("smoothing_radii", radius, at_least=0)
        if self.smoothing_alpha <= 0.5**self.smoothing_draws:
            raise ValueError(
                f"smoothing_draws={self.smoothing_draws}: they certify nothing at smoothing_alpha="
                f"{self.smoothing_alpha:g}, not even where all of them agree; give more"
            )

    def idle(self) -> dict[str, str]:
        """Options that do nothing as the others are."""
        return without(self.smoothing, "--smoothing names no noise", *DEPENDENT)


@dataclass(frozen=True)
class Smoothed(Measurement):
    """The measurement: saved image by image, for an image alone takes thousands of passes."""

    def run(self, model: nn.Module, shard: EvaluationImages, how: ShardRun) -> Journal:
        """Certify a shard, or what is left of it."""
        return super().run(model, shard, replace(how, batch_size=1))


def measurements(setup: Setup) -> list[Measurement]:
    """The draws of each noise, on some images."""
    config, options = setup.config, options_of(setup.config, SmoothingOptions)
    few = options.smoothing_images
    images = setup.subset(few) if few < setup.num_images else "all"
    found = list[Measurement]()
    for sigma in dict.fromkeys(options.smoothing):
        given = {"select": options.smoothing_select, "draws": options.smoothing_draws, "seed": config.seed}
        found.append(Smoothed(
            f"smoothing_{sigma}", _answers(sigma, config.batch_size, given), {"sigma": sigma, **given}, images,
            f"smoothed, σ = {sigma}", cost=float(given["select"] + given["draws"]),
        ))  # fmt: skip
    return found


def _answers(sigma: float, batch_size: int, given: dict[str, int]) -> Outcome:
    def outcome(model: nn.Module, images: Tensor, labels: Tensor, samples: Tensor) -> Row:
        pairs = [
            smoothed_answer(model, image, sigma, sample=sample, batch_size=batch_size, **given)
            for image, sample in zip(images, samples.tolist(), strict=True)
        ]
        return {"label": labels, "guess": [guess for guess, _ in pairs], "hits": [hits for _, hits in pairs]}

    return outcome


def summarize(setup: Setup, items: Sequence[Measurement], records: Records) -> Numbers | None:
    """Certified accuracies of each noise."""
    options = options_of(setup.config, SmoothingOptions)
    return {str(item.parameters["sigma"]): _certified(item, records, setup, options) for item in items} or None


def _certified(item: Measurement, records: Records, setup: Setup, options: SmoothingOptions) -> dict[str, Any]:
    rows, sigma, draws = records.rows(item), item.parameters["sigma"], item.parameters["draws"]
    alpha = options.smoothing_alpha
    # Images share few counts: each bound is computed once.
    radius_of = {hits: certified_radius(hits, draws, sigma, alpha) for hits in set(rows["hits"])}
    radii = [radius_of[hits] for hits in rows["hits"]]
    right = [r for r, guess, y in zip(radii, rows["guess"], rows["label"], strict=True) if guess == y and r is not None]
    largest, total = certified_radius(draws, draws, sigma, alpha) or 0.0, len(radii)

    def at(radius: float) -> dict[str, Any]:
        return {"radius": radius, **Count(sum(r >= radius for r in right), total).as_dict()}

    asked = sorted(set(options.smoothing_radii)) or [k * sigma for k in range(int(largest / sigma) + 1)]
    return {
        **item.parameters, "alpha": alpha, "largest": largest, "total": total, "images": setup.num_images,
        "abstained": sum(r is None for r in radii),
        "average": sum(right) / total,
        "certified": [at(radius) for radius in asked],
        "curve": [at(largest * (k / POINTS)) for k in range(POINTS + 1)],
        "seconds": records.seconds(item),
        "answers": {str(s): [g, r] for s, g, r in zip(rows["sample"], rows["guess"], radii, strict=True)},
    }  # fmt: skip


def render(numbers: Numbers) -> str:
    """What is certified, a table, and the curves."""
    first = next(iter(numbers.values()))
    words = (
        "What is certified here is not the model itself but the smoothed classifier made of it: the class that the "
        "model answers most often where Gaussian noise is added to the image (Cohen et al., arXiv 1902.02918). Who "
        f"uses the model without the noise has no certificate. Each image's class is chosen by {first['select']} draws "
        f"and certified by {first['draws']} others: no L2 perturbation smaller than its radius changes the class. Each "
        f"certificate holds with probability {1 - first['alpha']:g} over the draws (Clopper and Pearson's bound)."
    )
    rows = [
        [f"{sigma}", f"{e['radius']:.4g}", percent(e["accuracy"]), span(e["interval"]), f"{e['correct']}/{e['total']}"]
        for sigma, found in numbers.items()
        for e in found["certified"]
    ]
    more = [
        f"σ = {sigma}: abstains on {found['abstained']} of {found['total']} images; average certified radius "
        f"{found['average']:.3f} (0 where wrong); so many draws certify {found['largest']:.3f} at most."
        for sigma, found in numbers.items()
    ]
    head = ["σ", "L2 radius", "certified accuracy", "95 % interval", "certified"]
    lines = [_line(f"σ = {sigma}", found) for sigma, found in numbers.items()]
    return (
        paragraph(words)
        + _chart(lines, f"Certified accuracy of the smoothed classifier on {first['total']} images.")
        + table(head, rows, numbers=range(1, 5), caption="Certified accuracy at L2 radii; Wilson intervals")
        + "".join(paragraph(text, "soft") for text in more)
    )


def _line(label: str, found: dict[str, Any]) -> Line:
    return Line(
        label, [(e["radius"], 100 * e["accuracy"]) for e in found["curve"]],
        [(100 * e["interval"][0], 100 * e["interval"][1]) for e in found["curve"]],
    )  # fmt: skip


def _chart(lines: Sequence[Line], words: str) -> str:
    chart = line_chart(
        lines, words, x_label="L2 radius", y_label="certified accuracy (%)", percent=True, x_from=0.0
    )  # fmt: skip
    return figures(figure(chart, words))


def columns(numbers: Numbers) -> list[Column]:
    """The certified accuracies; those of other draws or another confidence are other columns of a comparison."""
    return [
        Column(
            f"smoothing {sigma} {found['draws']} {found['alpha']:g} {e['radius']:g}",
            f"smoothed (σ = {sigma}): certified at L2 {e['radius']:.4g}", e["accuracy"],
            found["total"] if found["total"] < found["images"] else None,
        )
        for sigma, found in numbers.items()
        for e in found["certified"]
    ]  # fmt: skip


def compare(models: Sequence[tuple[str, Numbers]]) -> str:
    """The curves of several models, a line for each noise."""
    lines = [
        _line(f"{name}, σ = {sigma} ({found['total']} images)", found)
        for name, numbers in models
        for sigma, found in numbers.items()
    ]
    words = "Certified accuracy of the smoothed classifiers, not of the models themselves, with 95 % intervals."
    return _chart(lines, words)


register(Topic(
    "smoothing", "Certified accuracy by randomised smoothing", measurements, summarize, render, 65, SmoothingOptions,
    columns=columns, compare=compare,
))  # fmt: skip
