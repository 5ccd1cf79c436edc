"""What the ranks must do in the same step although only one of them knows: stop, or save because time has passed.

One small all-reduce every k steps, k such that it comes about twice a second: agreeing after every step would cost a
short one several per cent, and a scheduler's signal waits minutes, not milliseconds. k is agreed on with it.
"""

import time

import torch
import torch.distributed as dist

from mimir_fast.world import World

INTERVAL = 0.5  # seconds
MAX_STEPS = 100


class Agreement:
    """Asked after each step, with the same steps on every rank.

    Attributes:
        rounds: how often the ranks have talked.
    """

    def __init__(self, world: World, step: int) -> None:
        self.world, self.rounds = world, 0
        self._next = self._last = step
        self._since = time.monotonic()

    def ask(self, step: int, *, stop: bool, save: bool) -> tuple[bool, bool]:
        """(stop, save) as any rank wants it; (False, False) between the steps in which they talk. Collective."""
        if self.world.size == 1:
            return stop, save
        if step < self._next:
            return False, False
        a_step = (time.monotonic() - self._since) / max(1, step - self._last)
        pace = min(MAX_STEPS, max(1, int(INTERVAL / max(a_step, 1e-9))))
        # The slowest pace of all: -k, because the maximum is taken.
        votes = torch.tensor([int(stop), int(save), -pace])
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=self.world.group)
        self.rounds += 1
        stopping, saving, pace = (int(v) for v in votes)
        self._last, self._next, self._since = step, step - pace, time.monotonic()
        return bool(stopping), bool(saving)
