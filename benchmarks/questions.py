"""The questions there are, and the time each is given."""

from dataclasses import dataclass
from importlib import import_module

from benchmarks.case import Cases


@dataclass(frozen=True)
class Question:
    """Seconds of one question.

    Attributes:
        box_s: timing of all providers of one of its cases, at size `quick`.
        suite_s: its share of the device suite's 540 s, compilation and gates included; 0: not in the suite.
        suite_box_s: timing of a case in the suite: some hundred samples of a kernel, some ten of a step.
        quick: among what a laptop does in a few minutes.
        named_only: run only when it is asked for by its name.
    """

    box_s: float
    suite_s: float = 0
    suite_box_s: float = 1
    quick: bool = False
    named_only: bool = False


# In the order in which they run. The shares of the suite add up to 540 s with its tests and the ceilings.
QUESTIONS = {
    "patches": Question(3, suite_s=60, quick=True),
    "linf_step": Question(3, suite_s=20, quick=True),
    "random_masks": Question(2, suite_s=10, quick=True),
    "attention": Question(3, suite_s=40),
    "hsic": Question(10, suite_s=80, quick=True),
    "nhsic": Question(4, suite_s=15, quick=True),
    "step": Question(20, suite_s=170, suite_box_s=6, quick=True),
    "finetune_step": Question(20, suite_s=30, suite_box_s=6),
    "loader": Question(10, suite_s=25, suite_box_s=4, quick=True),
    "families": Question(30),
    "autoattack": Question(0),
    "growth": Question(4, named_only=True),
}


def cases_of(question: str) -> Cases:
    """The `cases` function of a question's file."""
    cases: Cases = import_module(f"benchmarks.{question}").cases
    return cases
