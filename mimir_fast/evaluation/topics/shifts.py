"""Other test sets as they are: folders of class folders such as ImageNet-A, ImageNet-R and ImageNet-V2.

A folder's class folders are named as the data's classes, or numbered 0 … K−1 (ImageNet-V2) where no class is called by
a number. Where it has some of the classes only, the model chooses among these: the benchmarks' own rule (Hendrycks et
al., arXiv 1907.07174, 2006.16241).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mimir_fast.attacks.pgd import NO_CLASS, predicted
from mimir_fast.data.sources.files import FileSource
from mimir_fast.data.sources.walk import walk
from mimir_fast.evaluation.content import content_of
from mimir_fast.evaluation.html import paragraph, percent, span, table
from mimir_fast.evaluation.images import EvaluationImages, ImageSets, MakeSet, load_from
from mimir_fast.evaluation.measure import Measurement, Outcome, Records, Row
from mimir_fast.evaluation.topic import Numbers, Setup, Topic, options_of, register


@dataclass
class ShiftOptions:
    """Which other test sets are evaluated."""

    shifts: tuple[str, ...] = ()
    """Folders of class folders to evaluate without attack, such as ImageNet-A, ImageNet-R or ImageNet-V2; where a
    folder has some of the classes only, the others' logits are left out."""


def open_folder(folder: Path, classes: tuple[str, ...]) -> FileSource:
    """The images of a folder, with the data's class numbers.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: it has class folders the data does not know, or no images.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"--shifts {folder}: there is no such folder; wanted one that holds class folders")
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    number_of = {name: i for i, name in enumerate(classes)}
    # 7 may be the class of that name or the eighth one: numbers count only where no class is called by one.
    if not any(name.isdigit() for name in classes) and all(n.isdigit() and int(n) < len(classes) for n in names):
        number_of = {name: int(name) for name in names}
    if unknown := [name for name in names if name not in number_of]:
        raise ValueError(
            f"--shifts {folder}: {len(unknown)} of its {len(names)} class folders, such as {unknown[0]}, are none of "
            f"the {len(classes)} classes ({classes[0]}, …); name them so"
            + ("" if any(name.isdigit() for name in classes) else ", or number them from 0")
        )
    paths = [(f"{name}/{file}", number_of[name]) for name in names for file in walk(folder / name).images]
    if not paths:
        raise ValueError(f"--shifts {folder}: it holds no images")
    return FileSource(folder.name, folder, [p for p, _ in paths], [n for _, n in paths], list(classes))


def folders_of(setup: Setup) -> dict[str, Path]:
    """Name in the report → folder, each once, however they are ordered; those of one name are called by their paths."""
    asked = {Path(folder).resolve(): folder for folder in options_of(setup.config, ShiftOptions).shifts}
    times = Counter(path.name for path in asked)
    return {path.name if times[path.name] == 1 else typed: path for path, typed in asked.items()}


def check(setup: Setup) -> None:
    """Open every folder and two of its images before anything is measured."""
    for folder in folders_of(setup).values():
        source = open_folder(folder, setup.classes)
        if (trial := setup.trial) is not None:
            load_from(source, trial.config, np.unique([0, len(source) - 1]), trial.fitting)


def measurements(setup: Setup) -> list[Measurement]:
    """Accuracy on each folder, among the classes it has."""
    found = []
    for label, folder in folders_of(setup).items():
        source = open_folder(folder, setup.classes)
        present = sorted({int(number) for number in source.labels})
        name = "".join(c if c.isalnum() or c in "-_." else "_" for c in label)
        found.append(Measurement(
            f"shift_{name}", _among(present),
            {"folder": str(folder.resolve()), "classes": len(present), "content": content_of(source)},
            f"shift:{label}", label, make_set=_images_of(source),
        ))  # fmt: skip
    return found


def _images_of(source: FileSource) -> MakeSet:
    """The images of a folder, cut into shards as the evaluated ones are."""

    def make(sets: ImageSets, shard: int) -> EvaluationImages:
        mine = torch.arange(shard, len(source), sets.num_shards)
        if len(mine) == 0:  # fewer images than processes
            return sets.shard("all", shard).take(mine)
        return load_from(source, sets.config, mine.numpy(), sets.fitting)

    return make


def _among(present: list[int]) -> Outcome:
    def outcome(model: nn.Module, images: Tensor, labels: Tensor, samples: Tensor) -> Row:
        chosen = torch.tensor(present, device=images.device)
        with torch.no_grad():
            among = predicted(model(images)[:, chosen])
        prediction = torch.where(among == NO_CLASS, NO_CLASS, chosen[among])
        return {"label": labels, "correct": (prediction == labels).int(), "prediction": prediction}

    return outcome


def summarize(setup: Setup, items: Sequence[Measurement], records: Records) -> Numbers | None:
    """Correct images of each folder, and how many classes it has."""
    return {item.label: {**records.count(item).as_dict(), **item.parameters} for item in items} or None


def render(numbers: Numbers) -> str:
    """A table with one row a test set."""
    rows = [
        [name, percent(e["accuracy"]), span(e["interval"]), str(e["total"]), str(e["classes"])]
        for name, e in numbers.items()
    ]
    words = (
        "Accuracy without attack on other images of the same classes; the model chooses among the classes a set has."
    )
    return paragraph(words) + table(
        ["test set", "accuracy", "95 % interval", "images", "classes"], rows, numbers=range(1, 5)
    )


register(Topic("shifts", "Other test sets", measurements, summarize, render, 90, ShiftOptions, check))
