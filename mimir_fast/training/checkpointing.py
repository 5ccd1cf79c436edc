"""When a run is saved, how failures of it are taken, and what is kept."""

import time
from typing import Any

from torch import Tensor

from mimir_fast.checkpoints.saving import Saver
from mimir_fast.training.loggers import Logger
from mimir_fast.training.run_config import RunConfig
from mimir_fast.training.run_folder import RunFolder
from mimir_fast.world import World


class Checkpointing:
    """Saves beside training into the run's folder; a full disk is said and survived.

    Attributes:
        saved: the step of the newest checkpoint that was begun, or gone on from.
        seconds: for which steps have waited for saving.
    """

    def __init__(self, folder: RunFolder, world: World, run: RunConfig, logger: Logger) -> None:
        self.folder, self.world, self.run, self.logger = folder, world, run, logger
        self.saved, self.seconds = 0, 0.0  # a run that begins has nothing to lose at step 0
        self._saver = Saver(world)
        self._since = time.monotonic()

    def time_is_up(self) -> bool:
        """`save_minutes` have passed since the last save."""
        return self.run.save_minutes > 0 and time.monotonic() - self._since > 60 * self.run.save_minutes

    def save(self, step: int, tensors: dict[str, Tensor], meta: dict[str, Any], *, best: bool = False) -> None:
        """Begin to write the checkpoint of `step`; training may go on as soon as this returns. Collective."""
        started = time.monotonic()
        self.settle()
        target = self.folder.checkpoints / f"step-{step:08d}"

        def then() -> None:
            if best:
                self.folder.set_best(target)
            self.folder.prune(self.run.keep_last, self.run.keep_every)

        try:
            self._saver.start(target, tensors, meta, then)
            self.saved = step
        except OSError as error:
            self._warn(error)
        self._since = time.monotonic()
        self.seconds += self._since - started

    def settle(self) -> bool:
        """Wait for the save in progress; False, after saying so, when it failed. The same on all ranks."""
        try:
            self._saver.wait()
        except OSError as error:
            self.saved = -1
            self._warn(error)
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
                self._saver.start(self.folder.checkpoints / f"step-{step:08d}", tensors, meta)
                self._saver.wait()
                self.saved = step

    def close(self) -> None:
        """Let the thread go."""
        self._saver.close()

    def _warn(self, error: OSError) -> None:
        self.logger.say(f"WARNING: {error}. Free some space: the next try is in {self.run.save_every} steps at most")
