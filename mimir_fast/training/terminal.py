"""What a person sees of a run: plain lines in a file or a pipe, and on a terminal one line that stays at the bottom.

The plain lines are kept in the run's log.txt as well, each with its time.

    step 120/468 ━━━━━━━━───────────── 1 min 12 s left  loss 0.4127  reconstruction 0.4101  624 images/s

Step, bar, time left and loss come first, then as many of the other numbers as the columns hold; none is cut in half.
"""

import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mimir_fast.training.loggers import Logger

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.text import Text

BAR = (4, 24)
"""Columns of the bar, at least and at most; it gives way to step, time left and loss."""


class Terminal(Logger):
    """A live line on a terminal, plain lines otherwise."""

    def __init__(self, total_steps: int, first_step: int) -> None:
        self._line = ProgressLine(total_steps, first_step)
        self._live: Any = None
        if sys.stdout.isatty():
            from rich.console import Console
            from rich.live import Live

            # A console of its own: rich's common one is as whoever asked first found the terminal. Transient: nothing
            # of it stays below the closing words.
            self._live = Live(self._line, console=Console(), auto_refresh=False, transient=True)
            self._live.start(refresh=True)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        plain = self._line.take(step, values)
        if self._live is None:
            print(plain, flush=True)
        else:
            self._live.refresh()

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        if self._live is not None:  # kept in sight, the next step would replace it
            self.say(f"step {step + 1}/{self._line.total}  {'  '.join(in_words(values))}")

    def say(self, text: str) -> None:
        if self._live is not None:
            self._live.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()


class LogFile(Logger):
    """All lines of all starts of a run, each with its time, and what ended a start."""

    def __init__(self, path: Path, total_steps: int, first_step: int) -> None:
        self._line = ProgressLine(total_steps, first_step)
        self._file = path.open("a")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.say(self._line.take(step, values))

    def say(self, text: str) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        self._file.write("".join(f"{stamp}  {line}\n" for line in text.splitlines()))
        self._file.flush()

    def ended(self, error: BaseException) -> None:
        self.say(f"{type(error).__name__}: {error}")

    def close(self) -> None:
        self._file.close()


class ProgressLine:
    """The live line; rich asks it for its text at the width that the terminal has now.

    Attributes:
        total: steps of the run.
    """

    def __init__(self, total: int, done: int) -> None:
        self.total, self._done = total, done
        self._left, self._numbers = "", list[str]()

    def take(self, step: int, values: dict[str, float]) -> str:
        """Remember the numbers of a step (0-based); a plain line of all of them."""
        numbers = in_words(values)
        self._done = step + 1
        if "loss" in values:
            self._left = f" {duration(values['eta_s'])} left" if "eta_s" in values else ""
            self._numbers = numbers
        eta = f"  eta {duration(values['eta_s'])}" if "eta_s" in values else ""
        return f"step {step + 1}/{self.total}  {'  '.join(numbers)}{eta}"

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "Iterator[Text]":
        yield self.text(options.max_width, ascii_only=options.ascii_only)

    def text(self, width: int, *, ascii_only: bool = False) -> "Text":
        """The line in at most `width` columns."""
        from rich.text import Text

        head, first = f"step {self._done}/{self.total}", "".join(f"  {number}" for number in self._numbers[:1])
        room = width - len(head) - len(self._left) - len(first) - 1
        bar = min(room, BAR[1]) if room >= BAR[0] else 0
        line = Text(head, no_wrap=True, overflow="ellipsis", end="")
        if bar:
            full, empty = "=-" if ascii_only else "━─"
            filled = round(bar * min(1.0, self._done / max(1, self.total)))
            line.append(" " + full * filled, "bar.complete").append(empty * (bar - filled), "bar.back")
        line.append(self._left, "progress.remaining").append(first)
        for number in self._numbers[1:]:
            if len(line) + 2 + len(number) > width:
                break
            line.append(f"  {number}")
        return line


def in_words(values: dict[str, float]) -> list[str]:
    """Each number as a person reads it, loss first; the time left is not among them."""
    ordered = sorted(values.items(), key=lambda item: item[0] != "loss")
    return [describe(name, value) for name, value in ordered if name != "eta_s"]


def describe(name: str, value: float) -> str:
    """`name value` in the digits a person needs."""
    if name == "data_wait":
        return f"data-wait {value:.1%}"
    if name == "mfu":
        return f"MFU {value:.1%}"
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
