"""The questions there are, and the time each is given."""

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Literal

from benchmarks.case import Cases


@dataclass(frozen=True)
class Question:
    """Seconds of one question.

    Attributes:
        box_s: timing of all providers of one of its cases, at size `quick`.
        suite: the part of the device suite that times it; "": not in the suite.
        suite_s: its share of that part's 200 s, compilation and gates included.
        suite_box_s: timing of a case in the suite: some hundred samples of a kernel, some ten of a step.
        quick: among what a laptop does in a few minutes.
        named_only: run only when it is asked for by its name.
    """

    box_s: float
    suite: Literal["", "kernels", "steps"] = ""
    suite_s: float = 0
    suite_box_s: float = 1
    quick: bool = False
    named_only: bool = False


# In the order in which they run. The shares of each part of the suite add up to 200 s with the ceilings.
QUESTIONS = {
    "patches": Question(3, suite="kernels", suite_s=60, quick=True),
    "linf_step": Question(3, suite="kernels", suite_s=15, quick=True),
    "random_masks": Question(2, suite="kernels", suite_s=10, quick=True),
    "attention": Question(3, suite="kernels", suite_s=35),
    "hsic": Question(10, suite="kernels", suite_s=60, quick=True),
    "nhsic": Question(4, suite="kernels", suite_s=15, quick=True),
    "step": Question(20, suite="steps", suite_s=130, suite_box_s=6, quick=True),
    "finetune_step": Question(20, suite="steps", suite_s=30, suite_box_s=6),
    "loader": Question(10, suite="steps", suite_s=25, suite_box_s=4, quick=True),
    "families": Question(30),
    "autoattack": Question(0),
    "growth": Question(4, named_only=True),
    "robust": Question(0, named_only=True),
}


def module_of(question: str) -> ModuleType:
    """A question's file. It has `cases`, or, where it times no providers in turn, `records`; and `draw` where the
    usual picture does not fit."""
    return import_module(f"benchmarks.{question}")


def cases_of(question: str) -> Cases:
    """The `cases` function of a question's file."""
    cases: Cases = module_of(question).cases
    return cases
