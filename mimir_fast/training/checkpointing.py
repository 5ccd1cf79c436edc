"""When a run is saved, how failures of it are taken, and which checkpoint is the best."""

import math
import time
from typing import Any

from torch import Tensor

from mimir_fast.checkpoints.durable import is_full
from mimir_fast.checkpoints.saving import Saver
from mimir_fast.training.loggers import Logger
from mimir_fast.training.run_config import RunConfig
from mimir_fast.training.run_folder import RunFolder
from mimir_fast.world import World

Scored = tuple[float, int | None]


class Checkpointing:
    """Saves beside training into the run's folder; a full disk is said and survived.

    Attributes:
        saved: the step of the newest checkpoint that was begun, or gone on from.
        best: score and step of the best checkpoint that was begun; (-inf, None) while there is none.
        seconds: for which steps have waited for saving.
    """

    def __init__(self, folder: RunFolder, world: World, run: RunConfig, logger: Logger) -> None:
        self.folder, self.world, self.run, self.logger = folder, world, run, logger
        self.saved, self.seconds = 0, 0.0  # a run that begins has nothing to lose at step 0
        self.best: Scored = (-math.inf, None)
        self._before: Scored = self.best  # the best one without the save in progress
        self._candidate: Scored = self.best  # what was evaluated as better
        self._due = False
        self._saver = Saver(world)
        self._since = time.monotonic()

    def restore(self, step: int, meta: dict[str, Any]) -> None:
        """Go on from the checkpoint of `step`. Collective."""
        self.saved = step
        best = meta.get("best_step")
        if meta["best_score"] is not None and self.world.on_main(lambda: self.folder.restore_best(best)):
            self.best = (meta["best_score"], best)

    def scored(self, step: int, score: float) -> None:
        """The weights of `step` were evaluated: if they are the best so far, they are to be saved."""
        if score > self.best[0]:
            self._candidate, self._due = (score, step), True

    def time_is_up(self) -> bool:
        """`save_minutes` have passed since the last save."""
        return self.run.save_minutes > 0 and time.monotonic() - self._since > 60 * self.run.save_minutes

    def due(self, step: int, last: int, *, timed: bool) -> bool:
        """Whether to save now, or as soon as all is well; the `last` step is saved by `finish`."""
        self._due = self._due or timed or (step % self.run.save_every == 0 and step < last)
        return self._due

    def save(self, step: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Begin to write the checkpoint of `step`; training may go on as soon as this returns. Collective."""
        started = time.monotonic()
        self.settle()
        self._due = False
        try:
            self._start(step, tensors, meta)
            self.saved = step
        except OSError as error:
            self._failed(error)
        self._since = time.monotonic()
        self.seconds += self._since - started

    def settle(self) -> bool:
        """Wait for the save in progress; False, after saying so, when it failed. The same on all ranks."""
        try:
            self._saver.wait()
        except OSError as error:
            self.saved = -1
            self._failed(error)
            return False
        return True

    def finish(self, step: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Make sure that `step` is on the disk, trying twice. Collective.

        Raises:
            OSError: it is not.
        """
        self.settle()
        if self.saved != step:
            self.save(step, tensors, meta)
            if not self.settle() or self.saved != step:
                self._start(step, tensors, meta)
                self._saver.wait()
                self.saved = step

    def close(self) -> None:
        """Wait for the save in progress and end the thread that writes."""
        self._saver.close()

    def _start(self, step: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        target = self.folder.checkpoints / f"step-{step:08d}"
        self._before = self.best
        if self._candidate[1] == step:  # what is saved later has other weights than those that were evaluated
            self.best = self._candidate
        score, best = self.best

        def then() -> None:
            if best == step:
                self.folder.set_best(target)
            self.folder.prune(self.run.keep_last, self.run.keep_every)

        # JSON has no infinity: None while nothing was evaluated.
        self._saver.start(
            target, tensors, {**meta, "best_score": None if best is None else score, "best_step": best}, then
        )

    def _failed(self, error: OSError) -> None:
        self.best = self._before
        advice = "Free some space: the" if is_full(error) else "The"
        self.logger.say(f"WARNING: {error}. {advice} next try is in {self.run.save_every} steps at most")
