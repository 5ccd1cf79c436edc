"""Python's garbage collector, in the same steps of every rank.

It comes when a process has made many objects, in another step on each rank, and all of them wait for the one that it
holds up: with N ranks N times as often. So it is off while a run trains, what lives on from the start is not walked
again, and what steps have left in cycles is collected every `EVERY` steps, by all ranks together.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

EVERY = 100  # steps


@contextmanager
def collected_by_hand() -> Iterator[None]:
    """Without automatic collections inside; afterwards as before, also for what the process does next."""
    was_on = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()


def collect_after(step: int) -> None:
    """Collect if it is one of the steps for that; as they are numbered in the run, so on all ranks together."""
    if step % EVERY == 0:
        gc.collect()
