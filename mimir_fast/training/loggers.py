"""Where a run's numbers and pictures go: metrics.jsonl, TensorBoard, Weights & Biases; terminal.py: the screen."""

import json
import math
import sys
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from mimir_fast.checkpoints.durable import write_text
from mimir_fast.versions import install_command
from mimir_fast.world import drop_unread


class Logger:
    """Does nothing; the rank that does not log has this one."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Take the numbers of a step (0-based), by name."""

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        """Take note of which numbers of a step, which `scalars` gets with all others, are those of an evaluation."""

    def picture(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        """Take a picture of a step, (H, W, 3) uint8."""

    def say(self, text: str) -> None:
        """A line for the person watching."""

    def ended(self, error: BaseException) -> None:
        """The run ends with an error, which the command prints."""

    def close(self) -> None:
        """Write what is still held, and free files and connections."""


class Loggers(Logger):
    """Several loggers as one. One that fails is switched off with a single warning: no log is worth a run.

    Args:
        builders: name → what makes it; a logger that cannot be made is missing, with the same warning.
    """

    def __init__(self, builders: dict[str, Callable[[], Logger]]) -> None:
        self.loggers: list[Logger] = []
        for name, build in builders.items():
            try:
                self.loggers.append(build())
            except Exception as error:  # third parties' writers raise what they like, also when they are made
                self._warn(name, error)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._each(lambda logger: logger.scalars(step, values))

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        self._each(lambda logger: logger.evaluated(step, values))

    def picture(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        self._each(lambda logger: logger.picture(step, name, image_HWC))

    def say(self, text: str) -> None:
        self._each(lambda logger: logger.say(text))

    def ended(self, error: BaseException) -> None:
        self._each(lambda logger: logger.ended(error))

    def close(self) -> None:
        self._each(lambda logger: logger.close())

    def _each(self, call: Callable[[Logger], None]) -> None:
        for logger in list(self.loggers):
            try:
                call(logger)
            except Exception as error:
                self.loggers.remove(logger)
                self._warn(type(logger).__name__, error)

    def _warn(self, name: str, error: Exception) -> None:
        if isinstance(error, BrokenPipeError):
            drop_unread()  # `| head -1` had enough
        text = f"WARNING: {name} failed and is switched off ({type(error).__name__}: {error}); training goes on"
        with suppress(OSError):
            print(text, file=sys.stderr, flush=True)
        self.say(text)


class JsonLines(Logger):
    """One JSON object a logged step; what a killed run wrote past its last checkpoint is dropped on resume."""

    def __init__(self, path: Path, first_step: int) -> None:
        kept = [line for line in read_lines(path) if isinstance(line.get("step"), int) and line["step"] < first_step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        # JSON has no NaN; null is what other readers understand.
        clean = {k: (v if math.isfinite(v) else None) for k, v in values.items()}
        self._file.write(json.dumps({"step": step, **clean}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines; a line cut short by a kill or damaged is left out."""
    lines = []
    for text in path.read_bytes().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:  # no JSON, or no UTF-8
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


class TensorBoard(Logger):
    """Scalars and pictures for `tensorboard --logdir`."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        self._writer.add_image(name, image_HWC, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases(Logger):
    """Scalars and pictures for wandb.ai, or wherever WANDB_MODE and WANDB_BASE_URL send them.

    Raises:
        ImportError: wandb is not installed.
    """

    def __init__(self, project: str, folder: Path, config: dict[str, Any]) -> None:
        wandb = import_wandb()
        self._image = wandb.Image
        # A function of the folder: a resumed run goes on in its own page.
        name = f"{folder.name}-{zlib.crc32(str(folder.resolve()).encode()):08x}"
        self._run = wandb.init(project=project, dir=str(folder), name=name, id=name, resume="allow", config=config)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._run.log({**values, "step": step}, step=step)

    def picture(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        self._run.log({name: self._image(image_HWC)}, step=step)

    def close(self) -> None:
        self._run.finish()


def import_wandb() -> Any:
    """The module.

    Raises:
        ImportError: naming the command that installs it.
    """
    try:
        import wandb  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise ImportError(f"--wandb needs Weights & Biases: {install_command('wandb')}, or leave it out") from error
    return wandb


class Pictures(Logger):
    """Writes each picture to FOLDER/NAME-STEPS.png, after how many steps it was made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def picture(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        from PIL import Image

        self.folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image_HWC).save(self.folder / f"{name}-{step + 1:08d}.png")
