"""Saved progress of per-image measurements: one JSON line a finished batch, so a killed evaluation goes on.

A line is {"start": 0, "stop": 128, "seconds": 1.5, "values": {"correct": [...], "loss": [...]}}. The first line holds
the fingerprint of everything the numbers depend on; another fingerprint is another measurement: refused, not mixed in.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Values = dict[str, list[float]]


def fingerprint(settings: Any) -> str:
    """A short hash of JSON-able settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def write_atomically(path: Path, text: str) -> None:
    """Replace the file in one step: after a kill there is the old content or the new one, never half."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with aside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


class Journal:
    """Values for images 0 … N−1 of a shard, appended batch by batch.

    Args:
        path: the file; its folder must exist. None keeps everything in memory.
        settings: JSON-able; whatever changes the numbers.
    Attributes:
        values: name → one number an image, so far.
        seconds: spent on them.
    Raises:
        ValueError: the file holds another measurement.
    """

    def __init__(self, path: Path | None, settings: Any) -> None:
        self.path, self.num_images, self.seconds = path, 0, 0.0
        self.values: Values = {}
        head = {"fingerprint": fingerprint(settings), "settings": settings}
        if path is None:
            return
        if path.exists() and (lines := path.read_text().splitlines(keepends=True)):
            self._restore(lines, head)
        else:
            write_atomically(path, json.dumps(head) + "\n")

    def _restore(self, lines: list[str], head: dict[str, Any]) -> None:
        assert self.path is not None
        saved = json.loads(lines[0])
        if saved["fingerprint"] != head["fingerprint"]:
            raise ValueError(
                f"{self.path} holds a measurement with other settings: {saved['settings']}, now {head['settings']}; "
                "give another --output_dir, or --overwrite to start anew"
            )
        whole = [line for line in lines[1:] if line.endswith("\n")]
        for line in whole:
            entry = json.loads(line)
            self._extend(entry["values"], entry["stop"], entry["seconds"])
        if len(whole) < len(lines) - 1:  # a line cut short by a kill
            write_atomically(self.path, lines[0] + "".join(whole))

    def _extend(self, values: Values, stop: int, seconds: float) -> None:
        for name, numbers in values.items():
            self.values.setdefault(name, []).extend(numbers)
        self.num_images = stop
        self.seconds += seconds

    def append(self, values: dict[str, Tensor], seconds: float = 0.0) -> None:
        """Record one batch: name → (B,)."""
        numbers = {name: value.detach().cpu().tolist() for name, value in values.items()}
        size = len(next(iter(numbers.values())))
        start, stop = self.num_images, self.num_images + size
        self._extend(numbers, stop, seconds)
        if self.path is not None:
            line = {"start": start, "stop": stop, "seconds": round(seconds, 4), "values": numbers}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def tensor(self, name: str) -> Tensor:
        """(N,) fp64 of one value."""
        return torch.tensor(self.values.get(name, []), dtype=torch.float64)
