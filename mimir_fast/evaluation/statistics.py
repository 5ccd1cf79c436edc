"""Counts of correct images with their intervals, and exact tests for outcomes of the same images.

Notation: b and c are the two kinds of discordant pairs, n the number of pairs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LEVEL = 0.05
"""Of every test."""
ODD_ONE = 0.01
"""Share of images that may be odd without meaning anything: one in 64 must not fail a model."""


@dataclass(frozen=True)
class Count:
    """Correct among all; prints as a percentage."""

    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """Part of the images that are classified correctly, 0 … 1."""
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy on the whole distribution; also sound at 0 and at 1.

        Wilson 1927, doi:10.1080/01621459.1927.10502953.
        """
        n, p, z = self.total, self.accuracy, 1.959964
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5 / (1 + z * z / n)
        # Where all are alike an end is exactly 0 or 1, which the formula meets but for rounding.
        low = 0.0 if self.correct == 0 else max(0.0, middle - half)
        return low, 1.0 if self.correct == n else min(1.0, middle + half)

    def as_dict(self) -> dict[str, Any]:
        """`correct`, `total`, `accuracy` and `interval`, for results.json."""
        return {
            "correct": self.correct, "total": self.total, "accuracy": self.accuracy, "interval": list(self.interval),
        }  # fmt: skip

    def __str__(self) -> str:
        return f"{100 * self.accuracy:.2f} % ({self.correct}/{self.total})"


def binomial_tail(successes: int, trials: int, p: float) -> float:
    """P(X ≥ successes) for X ~ Binomial(trials, p)."""
    if successes <= 0:
        return 1.0
    if successes > trials or p <= 0:
        return 0.0
    if p >= 1:
        return 1.0
    return min(1.0, math.fsum(
        math.exp(
            math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
            + k * math.log(p) + (trials - k) * math.log1p(-p)
        )
        for k in range(successes, trials + 1)
    ))  # fmt: skip


def odd_p(count: int, total: int) -> float:
    """p of so many odd images where one in a hundred may be odd; a single one among several proves nothing: 1."""
    return 1.0 if count == 1 < total else binomial_tail(count, total, ODD_ONE)


def mcnemar(more: int, less: int) -> float:
    """One-sided exact p that `more` discordant pairs outnumber `less` by chance (McNemar 1947, exact form)."""
    return binomial_tail(more, more + less, 0.5)


def mcnemar_two_sided(b: int, c: int) -> float:
    """Exact p of the hypothesis that both discordant kinds are equally likely."""
    return min(1.0, 2 * binomial_tail(max(b, c), b + c, 0.5))


def paired_difference(b: int, c: int, total: int) -> tuple[float, float, float]:
    """(difference, low, high): the accuracy of the first less that of the second, with its 95 % interval.

    Bonett & Price 2012 (doi:10.3102/1076998611411915): Wald's interval after one pseudo-pair of each discordant kind.

    Args:
        b: images only the first has right.
        c: images only the second has right.
        total: images both were evaluated on.
    """
    p, q = (b + 1) / (total + 2), (c + 1) / (total + 2)
    half = 1.959964 * math.sqrt(max(p + q - (p - q) ** 2, 0.0) / (total + 2))
    return (b - c) / total, max(-1.0, p - q - half), min(1.0, p - q + half)


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Order statistics between which the median of the distribution lies with 95 %; ∞ above where they are too few.

    The j-th smallest of n values is above the median where fewer than j of them are below it, and their number is
    binomial with p = 1/2: no assumption on the distribution (David & Nagaraja, Order Statistics, §7.1).

    Args:
        values: at least 0 each; ∞ for one that is larger than could be told.
    """
    ordered, n = sorted(values), len(values)
    j = next((j for j in range(n // 2, 0, -1) if binomial_tail(n - j + 1, n, 0.5) <= LEVEL / 2), 0)
    return (ordered[j - 1], ordered[n - j]) if j else (0.0, math.inf)


def discordant(first: Sequence[float], second: Sequence[float]) -> tuple[int, int]:
    """(images only the first has right, images only the second has right)."""
    pairs = [(a > 0, b > 0) for a, b in zip(first, second, strict=True)]
    return sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
