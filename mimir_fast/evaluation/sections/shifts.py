"""Other test sets as they are: folders of class folders such as ImageNet-A, ImageNet-R and ImageNet-V2.

A folder's class folders are named as the data's classes, or numbered 0 … K−1 (ImageNet-V2). Where it has some of the
classes only, the model chooses among these: the benchmarks' own rule (Hendrycks et al., arXiv 1907.07174, 2006.16241).
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mimir_fast.data.sources.folder import FileSource
from mimir_fast.evaluation.config import EvaluateConfig
from mimir_fast.evaluation.html import paragraph, percent, span, table
from mimir_fast.evaluation.images import EvaluationImages, Fitting, Special, load_from
from mimir_fast.evaluation.measure import Helpers, Measurement, Records, Row
from mimir_fast.evaluation.plan import Setup

NAME, TITLE = "shifts", "Other test sets"


def open_folder(folder: Path, classes: tuple[str, ...]) -> FileSource:
    """The images of a folder, with the data's class numbers.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: it has class folders the data does not know, or no images.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"--shifts {folder}: there is no such folder; wanted one that holds class folders")
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    numbered = bool(names) and all(name.isdigit() and int(name) < len(classes) for name in names)
    number_of = {name: int(name) for name in names} if numbered else {name: i for i, name in enumerate(classes)}
    if unknown := [name for name in names if name not in number_of]:
        raise ValueError(
            f"--shifts {folder}: {len(unknown)} of its {len(names)} class folders, such as {unknown[0]}, are none of "
            f"the {len(classes)} classes ({classes[0]}, …); name them so, or number them from 0"
        )
    paths = [(f"{name}/{file.name}", number_of[name]) for name in names for file in sorted((folder / name).iterdir())
             if file.is_file() and not file.name.startswith(".")]  # fmt: skip
    if not paths:
        raise ValueError(f"--shifts {folder}: it holds no images")
    return FileSource(folder.name, folder, [p for p, _ in paths], [n for _, n in paths], list(classes))


def check(config: EvaluateConfig, classes: tuple[str, ...]) -> None:
    """Missing folders are said before hours are spent."""
    for folder in config.shifts:
        open_folder(Path(folder), classes)


def images_of(config: EvaluateConfig, classes: tuple[str, ...], fitting: Fitting, num_shards: int) -> Special:
    """The set `shift:NUMBER`, sharded like the judged images, but of its own."""

    def make(name: str, shard: int, judged: Any) -> EvaluationImages:
        source = open_folder(Path(config.shifts[int(name)]), classes)
        mine = torch.arange(shard, len(source), num_shards)
        if len(mine) == 0:  # fewer images than processes
            return judged().take(mine)
        return load_from(source, config.data, mine.numpy(), fitting)

    return make


def measurements(setup: Setup) -> list[Measurement]:
    """Accuracy on each folder, among the classes it has."""
    found = []
    for number, folder in enumerate(setup.config.shifts):
        present = sorted({int(label) for label in open_folder(Path(folder), setup.classes).labels})
        parameters = {"folder": str(Path(folder).resolve()), "classes": len(present)}
        found.append(Measurement(f"shift_{number}", _among(present), parameters, f"shift:{number}", Path(folder).name))
    return found


def _among(present: list[int]) -> Any:
    def outcome(model: nn.Module, images: Tensor, labels: Tensor, samples: Tensor, helpers: Helpers) -> Row:
        chosen = torch.tensor(present, device=images.device)
        with torch.no_grad():
            prediction = chosen[model(images)[:, chosen].argmax(dim=1)]
        return {"label": labels, "correct": (prediction == labels).int(), "prediction": prediction}

    return outcome


def summarize(setup: Setup, records: Records) -> dict[str, Any] | None:
    """Counts of each folder."""
    items = measurements(setup)
    return {item.label: {**records.count(item).as_dict(), **item.parameters} for item in items} or None


def render(numbers: dict[str, Any]) -> str:
    """The table."""
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
