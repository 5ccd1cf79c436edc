"""Common corruptions, from published files or generated (evaluation/corruptions.py)."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from mimir_fast.evaluation.attacks import natural
from mimir_fast.evaluation.charts import bars
from mimir_fast.evaluation.config import EvaluateConfig
from mimir_fast.evaluation.corruptions import (
    GENERATED,
    SEVERITIES,
    WHERE_TO_GET,
    generate,
    generator_available,
    load_published,
    mean_corruption_error,
    published_names,
)
from mimir_fast.evaluation.html import figure, figures, paragraph, percent, table
from mimir_fast.evaluation.images import EvaluationImages, Special
from mimir_fast.evaluation.measure import Measurement, Records
from mimir_fast.evaluation.plan import Setup

NAME, TITLE = "corruptions", "Common corruptions"


def check(config: EvaluateConfig) -> None:
    """Missing files or libraries are said before hours are spent."""
    if config.corruptions == "generated" and not generator_available():
        raise ImportError("--corruptions generated needs a library: pip install corrupt-tta")
    if config.corruptions not in (None, "generated"):
        published_names(Path(str(config.corruptions)))


def images_of(config: EvaluateConfig) -> Special:
    """The set `corrupt:NAME:SEVERITY`."""

    def make(name: str, shard: int, judged: Any) -> EvaluationImages:
        corruption, _, severity = name.partition(":")
        images: EvaluationImages = judged()
        if config.corruptions == "generated":
            return generate(images, corruption, int(severity), config.seed)
        data = replace(config.data, limit=None)
        return load_published(Path(str(config.corruptions)), corruption, int(severity), images, data)

    return make


def measurements(setup: Setup) -> list[Measurement]:
    """Every corruption at every severity."""
    config = setup.config
    if config.corruptions is None:
        return []
    generated = config.corruptions == "generated"
    names = GENERATED if generated else published_names(Path(config.corruptions))
    kind = {"kind": "generated" if generated else "published", "seed": config.seed if generated else None}
    found = []
    for name in names:
        for severity in SEVERITIES:
            item = natural().on(f"corrupt:{name}:{severity}", "natural_on")
            found.append(replace(item, parameters={"corruption": name, "severity": severity, **kind}))
    return found


def summarize(setup: Setup, records: Records) -> dict[str, Any] | None:
    """Accuracies, their mean, and the mean corruption error where it is defined."""
    config, accuracy = setup.config, dict[str, dict[str, float]]()
    for item in measurements(setup):
        levels = accuracy.setdefault(item.parameters["corruption"], {})
        levels[str(item.parameters["severity"])] = records.count(item).accuracy
    if not accuracy:
        left_out = f"Common corruptions were left out. {WHERE_TO_GET}, or --corruptions generated."
        return {"accuracy": {}, "notes": [left_out]} if config.suite == "full" else None
    means = {name: sum(levels.values()) / len(levels) for name, levels in accuracy.items()}
    generated = config.corruptions == "generated"
    error = {name: {int(s): 1 - value for s, value in levels.items()} for name, levels in accuracy.items()}
    return {
        "kind": "generated" if generated else "published",
        "words": "Made with corrupt-tta, without impulse noise: not comparable with published CIFAR-10-C or ImageNet-C "
        "numbers."
        if generated
        else "Published files.",
        "accuracy": accuracy,
        "means": means,
        "mean": sum(means.values()) / len(means),
        "mce": mean_corruption_error(error) if config.data.source == "imagenet" and not generated else None,
    }


def render(numbers: dict[str, Any]) -> str:
    """Bars and the table."""
    if not numbers["accuracy"]:
        return ""
    severities = sorted({s for levels in numbers["accuracy"].values() for s in levels}, key=int)
    rows = [
        [name.replace("_", " "), *(percent(levels[s]) if s in levels else "" for s in severities),
         percent(numbers["means"][name])]
        for name, levels in numbers["accuracy"].items()
    ]  # fmt: skip
    mce = "" if numbers["mce"] is None else f" Mean corruption error relative to AlexNet: {numbers['mce']:.1f} %."
    words = "Accuracy under each corruption, mean over severities."
    chart = bars(
        [(name.replace("_", " "), round(100 * v, 1), None) for name, v in numbers["means"].items()], words,
        x_label="accuracy (%)",
    )  # fmt: skip
    head = ["corruption", *(f"severity {s}" for s in severities), "mean"]
    return (
        paragraph(f"{numbers['words']} Mean accuracy {percent(numbers['mean'])}.{mce}")
        + figures(figure(chart, words))
        + table(head, rows, numbers=range(1, len(head)))
    )
