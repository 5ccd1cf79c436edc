"""Unreadable files: replaced so that shapes stay, counted, reported, and a stop when there are too many.

The replacement is the next readable sample of the source: the same one on every rank and after every restart.
"""

import logging
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from mimir_fast.data.decode import UnreadableImageError
from mimir_fast.data.sources.base import ImageSource

_LOG = logging.getLogger(__name__)
T = TypeVar("T")


class TooManyBadFilesError(ValueError):
    """More files than `max_bad_files` are unreadable: the data are at fault, and the command says so in one line."""


def first_readable(index: int, length: int, read: Callable[[int], T], max_bad_files: int) -> tuple[int, T | None]:
    """The first sample from `index` on (around the end) that `read` accepts, and what it returned.

    (-1, None) if `max_bad_files + 1` in a row are unreadable; the consumer, who knows the paths, says so.
    """
    for step in range(min(max_bad_files + 1, length)):
        candidate = (index + step) % length
        try:
            return candidate, read(candidate)
        except (UnreadableImageError, OSError):
            continue
    return -1, None


class SkipLedger:
    """Which files of a source were skipped, found out from the samples that were asked for and those that came."""

    def __init__(self, source: ImageSource, max_bad_files: int, skipped: dict[str, str]) -> None:
        self.source, self.max_bad_files, self.skipped = source, max_bad_files, skipped

    def compare(self, wanted: np.ndarray, received: np.ndarray) -> None:
        """Note every file that was passed over.

        Raises:
            TooManyBadFilesError: with the number, the limit and the first reasons.
        """
        length = len(self.source)
        for start, stop in zip(wanted.tolist(), received.tolist(), strict=True):
            count = (stop - start) % length if stop >= 0 else min(self.max_bad_files + 1, length)
            for index in range(start, start + count):
                self._note(index % length)
            if stop < 0 or len(self.skipped) > self.max_bad_files:
                self._give_up()

    def _note(self, index: int) -> None:
        path = self.source.where(index)
        if path in self.skipped:
            return
        try:
            self.source.pixels(index)
            self.skipped[path] = f"{path}: could not be read at first, later it could; is the disk or network ill?"
        except (UnreadableImageError, OSError) as error:
            self.skipped[path] = str(error)
        _LOG.warning("skipped file %d (of %d allowed): %s", len(self.skipped), self.max_bad_files, self.skipped[path])

    def _give_up(self) -> None:
        reasons = "\n  ".join(list(self.skipped.values())[:5])
        raise TooManyBadFilesError(
            f"{len(self.skipped)} unreadable files in {self.source.name}, more than max_bad_files = "
            f"{self.max_bad_files}; repair or remove them (a run goes on without a hundredth of its files), or "
            f"raise --data.max_bad_files:\n  {reasons}"
        )
