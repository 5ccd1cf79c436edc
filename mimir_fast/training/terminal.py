"""What a person sees of a run: plain lines in a file or a pipe, and on a terminal one line that stays at the bottom.

    step 120/468 ━━━━━━━━───────────── 1 min 12 s left  loss 0.4127  reconstruction 0.4101  624 images/s

Step, bar, time left and loss come first, then as many of the other numbers as the columns hold; none is cut in half.
"""

import math
import sys
from collections.abc import Iterator
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
        numbers = self._line.take(step, values)
        if self._live is None:
            eta = f"  eta {duration(values['eta_s'])}" if "eta_s" in values else ""
            print(f"step {step + 1}/{self._line.total}  {'  '.join(numbers)}{eta}", flush=True)
        elif "loss" in values:
            self._live.refresh()
        else:  # of an evaluation: kept in sight, the next step would replace it
            self.say(f"step {step + 1}/{self._line.total}  {'  '.join(numbers)}")

    def say(self, text: str) -> None:
        if self._live is not None:
            self._live.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()


class ProgressLine:
    """The live line; rich asks it for its text at the width that the terminal has now.

    Attributes:
        total: steps of the run.
    """

    def __init__(self, total: int, done: int) -> None:
        self.total, self._done = total, done
        self._left, self._numbers = "", list[str]()

    def take(self, step: int, values: dict[str, float]) -> list[str]:
        """Remember the numbers of a step (0-based); they in words, loss first."""
        ordered = sorted(values.items(), key=lambda item: item[0] != "loss")
        numbers = [describe(name, value) for name, value in ordered if name != "eta_s"]
        self._done = step + 1
        if "loss" in values:
            self._left = f" {duration(values['eta_s'])} left" if "eta_s" in values else ""
            self._numbers = numbers
        return numbers

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
