"""Rows of finished images on disk, appended batch by batch: whatever is killed goes on where it was.

Rows of a shard are lines of a file:

    {"fingerprint": …, "settings": {…}}                                                  first: what they depend on
    {"start": 0, "stop": 128, "seconds": 1.5, "values": {"sample": […], "correct": […], "loss": […]}}

Another fingerprint is another measurement: refused, not mixed in.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimir_fast.checkpoints.durable import write_text
from mimir_fast.evaluation.changes import changes

Row = dict[str, Any]
"""Name → (B, …) tensor, or a list of B things JSON can hold."""


def fingerprint(settings: Any) -> str:
    """A short hash of JSON-able settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


class OtherMeasurementError(ValueError):
    """A file holds the rows of another measurement than the one that wants to go on in it."""


class Journal:
    """Rows of images 0 … N−1 of a shard, appended batch by batch.

    Args:
        path: the file; its folder must exist. None keeps everything in memory.
        settings: JSON-able; whatever changes the rows.
    Attributes:
        values: name → one value an image, so far.
        num_images: how many.
        seconds: spent on them.
    Raises:
        OtherMeasurementError: the file holds another measurement.
    """

    def __init__(self, path: Path | None, settings: Any = None) -> None:
        self.path, self.num_images, self.seconds = path, 0, 0.0
        self.values: dict[str, list[Any]] = {}
        if path is None:
            return
        head = {"fingerprint": fingerprint(settings), "settings": settings}
        if path.exists() and (lines := path.read_text().splitlines(keepends=True)) and lines[0].endswith("\n"):
            self._restore(path, lines, head["fingerprint"], settings)
        else:
            write_text(path, json.dumps(head) + "\n")

    def _restore(self, path: Path, lines: list[str], wanted: str, settings: Any) -> None:
        saved = json.loads(lines[0])
        if saved["fingerprint"] != wanted:
            raise OtherMeasurementError(
                f"{path} holds a measurement with other settings ({changes(saved['settings'], settings)}); "
                "give another --output_dir, or --overwrite to start anew"
            )
        whole = self._extend_by(lines[1:])
        if len(whole) < len(lines) - 1:  # a line cut short by a kill
            write_text(path, lines[0] + "".join(whole))

    def _extend_by(self, lines: list[str]) -> list[str]:
        """Read rows; returns the lines that are whole."""
        whole = [line for line in lines if line.endswith("\n")]
        for entry in map(json.loads, whole):
            self._extend(entry["values"], entry["stop"], entry["seconds"])
        return whole

    def _extend(self, values: dict[str, list[Any]], stop: int, seconds: float) -> None:
        for name, numbers in values.items():
            self.values.setdefault(name, []).extend(numbers)
        self.num_images = stop
        self.seconds += seconds

    def append(self, row: Row, seconds: float = 0.0) -> None:
        """Record one batch: name → (B, …) tensor or list of B."""
        values = {
            name: value.detach().cpu().tolist() if isinstance(value, Tensor) else list(value)
            for name, value in row.items()
        }
        start, size = self.num_images, len(next(iter(values.values())))
        self._extend(values, start + size, seconds)
        if self.path is not None:
            line = {"start": start, "stop": start + size, "seconds": round(seconds, 4), "values": values}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def tensor(self, name: str) -> Tensor:
        """(N, …) fp64 of one value."""
        return torch.tensor(self.values.get(name, []), dtype=torch.float64)


def read_journal(path: Path) -> Journal:
    """A journal as it is on disk, whatever it was made with; half a line at the end is left out."""
    journal = Journal(None)
    journal._extend_by(path.read_text().splitlines(keepends=True)[1:])
    return journal
