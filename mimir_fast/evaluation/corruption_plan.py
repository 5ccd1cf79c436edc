"""Which corruptions an evaluation measures, and what comes out of them."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from mimir_fast.evaluation import figures
from mimir_fast.evaluation.config import EvaluateConfig
from mimir_fast.evaluation.corruptions import (
    GENERATED,
    SEVERITIES,
    generate,
    generator_available,
    load_published,
    mean_corruption_error,
    published_names,
)
from mimir_fast.evaluation.images import EvaluationImages
from mimir_fast.evaluation.job import Job
from mimir_fast.evaluation.report import Picture


def check_corruptions(config: EvaluateConfig) -> None:
    """Missing files or libraries are said before hours are spent."""
    if config.corruptions == "generated" and not generator_available():
        raise ImportError("--corruptions generated needs a library: pip install corrupt-tta")
    if config.corruptions not in (None, "generated"):
        published_names(Path(str(config.corruptions)))


def corruption_list(config: EvaluateConfig) -> list[tuple[str, int]]:
    """(corruption, severity) pairs to measure."""
    if config.corruptions is None:
        return []
    names = GENERATED if config.corruptions == "generated" else published_names(Path(config.corruptions))
    return [(name, severity) for name in names for severity in SEVERITIES]


def corruption_parameters(config: EvaluateConfig, name: str, severity: int) -> dict[str, Any]:
    """What a corruption measurement depends on beside the images."""
    kind = "generated" if config.corruptions == "generated" else "published"
    return {
        "corruption": name,
        "severity": severity,
        "kind": kind,
        "seed": config.seed if kind == "generated" else None,
    }


def corrupted_images(config: EvaluateConfig, images: EvaluationImages) -> Iterator[tuple[str, int, EvaluationImages]]:
    """(corruption, severity, the corrupted versions of `images`), one after the other."""
    for name, severity in corruption_list(config):
        if config.corruptions == "generated":
            yield name, severity, generate(images, name, severity, config.seed)
        else:
            data = replace(config.data, limit=None)
            yield name, severity, load_published(Path(str(config.corruptions)), name, severity, images, data)


def summarize_corruptions(job: Job) -> tuple[dict[str, Any] | None, list[Picture]]:
    """(numbers, pictures) of the corruptions measured; (None, []) when there were none."""
    config = job.config
    accuracy: dict[str, dict[str, float]] = {}
    for name, severity in corruption_list(config):
        found = job.gather(f"corrupt_{name}_{severity}", corruption_parameters(config, name, severity))
        accuracy.setdefault(name, {})[str(severity)] = float(found.values["correct"].mean())
    if not accuracy:
        return None, []
    means = {name: sum(levels.values()) / len(levels) for name, levels in accuracy.items()}
    is_generated = config.corruptions == "generated"
    words = (
        "Made with corrupt-tta, without impulse noise: not comparable with published CIFAR-10-C or ImageNet-C numbers."
        if is_generated
        else "Published files."
    )
    error = {name: {int(s): 1 - value for s, value in levels.items()} for name, levels in accuracy.items()}
    numbers = {
        "kind": "generated" if is_generated else "published",
        "words": words,
        "accuracy": accuracy,
        "mean": sum(means.values()) / len(means),
        "mce": mean_corruption_error(error) if config.data.source == "imagenet" and not is_generated else None,
    }
    caption = "Accuracy under each corruption, mean over severities."
    return numbers, [Picture("Common corruptions", figures.corruption_bars(means), caption)]
