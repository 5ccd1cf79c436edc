"""How long is left, over all processes: each writes how far it is, the main one reads the others'.

Work is counted in passes through the model (Measurement.cost times images), so a line such as

    [ 37 %, about 12 min left]  apgd50: 128 of 500

is right to a factor of two or so at the start and better later on.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from mimir_fast.checkpoints.durable import write_text
from mimir_fast.evaluation.measure import Measurement

EVERY = 10.0
"""Seconds between two lines, and between two writes of a process."""


class TimeLeft:
    """What this process has done of its shards, and what the others have written of theirs.

    Args:
        folder: all processes see it.
        plan: all measurements.
        num_images: evaluated ones; sets of another size are guessed to have as many.
        num_shards: in all.
        rank, world_size: of this process; it works on shards rank, rank + world_size, …
        now: the clock, in seconds.
    """

    def __init__(
        self, folder: Path, plan: Sequence[Measurement], num_images: int, num_shards: int, rank: int, world_size: int,
        now: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.folder, self.rank, self.world_size, self.now = folder, rank, world_size, now
        self._images_a_shard = num_images / num_shards
        self._num_shards = num_shards
        mine = len(range(rank, num_shards, world_size))
        self._total = mine * sum(item.cost * self._size(item) for item in plan)
        self._done = self._fresh = 0.0  # finished work, and the part of it this start has done
        self._since = self._written = self._told = now()

    def _size(self, item: Measurement) -> float:
        """Images of a measurement's shard."""
        kind, _, rest = item.images.partition(":")
        return int(rest) / self._num_shards if kind == "few" else self._images_a_shard

    def ticker(self, item: Measurement, size: int, log: Callable[[str], None]) -> Callable[[float], None]:
        """What a measurement calls with the number of images done; to be called once a shard, before it runs."""
        start, last = self._done, None

        def tick(done: float) -> None:
            nonlocal last
            self._fresh += item.cost * (done - (last if last is not None else 0))
            last = done
            self._done = start + item.cost * done
            now = self.now()
            if now - self._written > EVERY:
                self._written = now
                self._write()
            if now - self._told > EVERY:
                self._told = now
                log(f"[{self.words()}]  {item.name}: {done:.0f} of {size}")

        self._end = start + item.cost * self._size(item)
        return tick

    def finished(self) -> None:
        """The measurement of the last ticker is done, just now or before this start."""
        self._done = self._end

    def own(self) -> tuple[float, float]:
        """(part done, seconds left) of this process."""
        share = min(1.0, self._done / max(self._total, 1e-9))
        spent = self.now() - self._since
        return share, spent * max(self._total - self._done, 0.0) / max(self._fresh, 1e-9)

    def words(self) -> str:
        """Part done and time left, of all processes: the slowest one's time."""
        shares, lefts = zip(self.own(), *self._others(), strict=True)
        return f"{100 * sum(shares) / len(shares):3.0f} %, about {duration(max(lefts))} left"

    def _others(self) -> list[tuple[float, float]]:
        paths = (self._path(rank) for rank in range(self.world_size) if rank != self.rank)
        return [tuple(json.loads(path.read_text())) for path in paths if path.exists()]

    def _path(self, rank: int) -> Path:
        return self.folder / f"time.{rank}of{self.world_size}.json"

    def _write(self) -> None:
        write_text(self._path(self.rank), json.dumps(self.own()) + "\n")


def duration(seconds: float) -> str:
    """Seconds as text, in the unit that suits: 45 s, 12 min, 3.1 h."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
