"""Where a run's numbers and pictures go: terminal, metrics.jsonl, TensorBoard. All share a no-op base."""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


class Logger:
    """Does nothing; the rank that does not log has this one."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Numbers of a step."""

    def picture(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        """A uint8 picture."""

    def say(self, text: str) -> None:
        """A line for the person watching."""

    def close(self) -> None:
        """Flush and let go."""


class Loggers(Logger):
    """Several loggers as one."""

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self.loggers = loggers

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for logger in self.loggers:
            logger.scalars(step, values)

    def picture(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        for logger in self.loggers:
            logger.picture(step, name, image_HWC)

    def say(self, text: str) -> None:
        for logger in self.loggers:
            logger.say(text)

    def close(self) -> None:
        for logger in self.loggers:
            logger.close()


class JsonLines(Logger):
    """One JSON object a logged step; what a killed run wrote past its last checkpoint is dropped on resume."""

    def __init__(self, path: Path, first_step: int) -> None:
        kept = [line for line in read_lines(path) if line["step"] < first_step]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        # JSON has no NaN; null is what other readers understand.
        clean = {k: (v if math.isfinite(v) else None) for k, v in values.items()}
        self._file.write(json.dumps({"step": step, **clean}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl; one cut short by a kill is left out."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


class TensorBoard(Logger):
    """Scalars and pictures for `tensorboard --logdir`."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step or None)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        self._writer.add_image(name, image_HWC, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class Pictures(Logger):
    """PNG files `NAME-STEP.png`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def picture(self, step: int, name: str, image_HWC: np.ndarray) -> None:
        from PIL import Image

        self.folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image_HWC).save(self.folder / f"{name}-{step:08d}.png")


class Terminal(Logger):
    """A live bar on a terminal, plain lines otherwise."""

    def __init__(self, total_steps: int, first_step: int) -> None:
        self.total_steps = total_steps
        self._bar: Any = None
        if sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=24),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
            )
            self._task = self._bar.add_task("", total=total_steps, completed=first_step, numbers="")
            self._bar.start()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        numbers = "  ".join(describe(name, value) for name, value in values.items() if name != "eta_s")
        if self._bar is not None:
            self._bar.update(self._task, completed=step + 1, numbers=numbers)
        else:
            eta = f"  eta {duration(values['eta_s'])}" if "eta_s" in values else ""
            print(f"step {step + 1}/{self.total_steps}  {numbers}{eta}", flush=True)

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def describe(name: str, value: float) -> str:
    """`name value` in the digits a person needs."""
    if name == "data_wait":
        return f"data-wait {value:.1%}"
    if name == "images_per_s":
        return f"{value:,.0f} images/s"
    if name == "memory_gib":
        return f"{value:.2f} GiB"
    if name == "lr" or (value and abs(value) < 1e-3):
        return f"{name} {value:.2e}"
    return f"{name} {value:.4f}" if not float(value).is_integer() else f"{name} {value:.0f}"


def duration(seconds: float) -> str:
    """`1 h 02 min`, `3 min 05 s` or `12 s`."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
