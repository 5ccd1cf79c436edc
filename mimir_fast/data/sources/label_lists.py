"""Lists of labels beside images without class folders, in the forms in which they are published.

metadata.csv, metadata.jsonl          Hugging Face's ImageFolder: `file_name` and `label` (or `class`, `target`, …)
LOC_val_solution.csv                  ImageNet's from Kaggle: ImageId, then the synset and boxes
synset_labels.txt, val.txt, …         a label a line, of the images sorted by name; or a file and its label a line

A label is a name, such as a synset (n01440764), or a number from 0 on: of the classes sorted by name.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LABEL_LISTS = (
    "metadata.csv", "metadata.jsonl", "LOC_val_solution.csv", "imagenet_2012_validation_synset_labels.txt",
    "synset_labels.txt", "val.txt", "labels.txt",
)  # fmt: skip
_DEVKIT = "ILSVRC2012_validation_ground_truth.txt"
_LABEL_COLUMNS = ("label", "labels", "class", "class_name", "cls", "target", "category")


@dataclass
class LabelList:
    """One list.

    Attributes:
        files: one a label, relative to the list's folder; None: the labels are those of the images sorted by name.
    """

    path: Path
    files: list[str] | None
    labels: list[str]


def find_list(folder: Path, root: Path) -> LabelList | None:
    """The list in `folder`, or that in `root` if `folder` has no folders in it; None without one.

    Raises:
        ValueError: it cannot be read, or names no labels.
    """
    has_folders = any(entry.is_dir() and not entry.name.startswith(".") for entry in folder.iterdir())
    for place in (folder,) if has_folders else (folder, root):
        for name in LABEL_LISTS:
            # ImageNet's lists are of its validation images.
            if (place / name).is_file() and (name.startswith("metadata") or folder.name != "train"):
                return _read(place / name, folder)
        if (place / _DEVKIT).is_file() and folder.name != "train":
            raise ValueError(
                f"{place / _DEVKIT} numbers the classes by ILSVRC2012_ID, which is no order of their synsets: put "
                f"imagenet_2012_validation_synset_labels.txt (a synset a line) into {place} and move this file away"
            )
    return None


def number_labels(labels: list[str], classes: list[str] | None, path: Path) -> tuple[list[int], list[str]]:
    """The labels as numbers, and the classes: those given, or the list's own.

    Raises:
        ValueError: a label that is none of the classes.
    """
    are_numbers = all(label.isascii() and label.isdigit() for label in labels)
    if classes is None:
        number = max(map(int, labels)) + 1 if are_numbers else 0
        classes = [str(label) for label in range(number)] if are_numbers else sorted(set(labels))
    known = {name: number for number, name in enumerate(classes)}
    if are_numbers and not set(labels) <= set(known):
        known = {str(number): number for number in range(len(classes))}
    if unknown := sorted(set(labels) - set(known)):
        raise ValueError(f"{path} has labels that are none of the {len(classes)} classes: {', '.join(unknown[:3])}")
    return [known[label] for label in labels], classes


def _read(path: Path, folder: Path) -> LabelList:
    try:
        rows = list({".csv": _csv, ".jsonl": _jsonl, ".txt": _text}[path.suffix](path))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as a list of labels: {error}") from error
    if not rows:
        raise ValueError(f"{path} names no images")
    files = [file for file, _ in rows]
    if path.name == "LOC_val_solution.csv" or (path.suffix == ".txt" and path.parent != folder):
        files = [file and str((folder / file).relative_to(path.parent)) for file in files]
    named = [file for file in files if file is not None]
    return LabelList(path, named if len(named) == len(files) else None, [label for _, label in rows])


def _column(columns: list[str]) -> str:
    found = next((name for name in _LABEL_COLUMNS if name in columns), None)
    if found is None or "file_name" not in columns:
        raise ValueError(
            f"it has the columns {', '.join(columns)}; wanted file_name and one of {', '.join(_LABEL_COLUMNS)}"
        )
    return found


def _csv(path: Path) -> Iterator[tuple[str | None, str]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if "PredictionString" in (reader.fieldnames or ()):
            yield from ((f"{row['ImageId']}.JPEG", row["PredictionString"].split()[0]) for row in reader)
            return
        column = _column(list(reader.fieldnames or ()))
        yield from ((row["file_name"], row[column].strip()) for row in reader)


def _jsonl(path: Path) -> Iterator[tuple[str | None, str]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip():
            row = json.loads(line)
            yield row["file_name"], str(row[_column(list(row))])


def _text(path: Path) -> Iterator[tuple[str | None, str]]:
    lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len({len(line) for line in lines}) > 1 or len(lines[0]) > 2:
        raise ValueError("wanted a label, or a file and its label, on each line")
    for line in lines:
        yield (line[0] if len(line) == 2 else None), line[-1]
