"""Statistics of paired differences: intervals, tests, correction for several of them, and equivalence.

Every function takes differences of two arms over seeds, n ≥ 2 of them, in the unit in which it answers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

import numpy as np

LEVEL = 0.05


@dataclass(frozen=True)
class Contrast:
    """What is said of one set of paired differences.

    Attributes:
        count: pairs.
        interval: of Student's t at 1 − level, as are those of `bootstrap`.
        bootstrap: percentiles of the means of resampled pairs.
        p: of the two-sided paired t test of no difference.
        equivalence: of TOST (two one-sided t tests) that the mean lies outside of ± margin.
        p_holm: p after Holm's correction over the contrasts it was asked with; p itself before.
    """

    mean: float
    sd: float
    count: int
    interval: tuple[float, float]
    bootstrap: tuple[float, float]
    p: float
    margin: float
    equivalence: float
    p_holm: float

    @property
    def verdict(self) -> str:
        """`differs` where the corrected test says so, `equivalent` where TOST does, else `open`; one may be both."""
        words = ["differs"] * (self.p_holm < LEVEL) + ["equivalent"] * (self.equivalence < LEVEL)
        return " and ".join(words) or "open"

    @property
    def torn(self) -> bool:
        """Whether 0 is in one of the two intervals alone."""
        inside = [low <= 0 <= high for low, high in (self.interval, self.bootstrap)]
        return inside[0] != inside[1]


def contrast(differences: Sequence[float], *, margin: float, level: float = LEVEL, draws: int = 10_000) -> Contrast:
    """Everything about one set of differences.

    Args:
        margin: > 0, within which a difference does not matter.
        level: of the intervals.
        draws: resamples of the bootstrap; seed 0.
    Raises:
        ValueError: fewer than two differences.
    """
    values, count = np.asarray(differences, dtype=np.float64), len(differences)
    if count < 2:
        raise ValueError(f"a contrast needs at least two pairs, got {count}")
    middle, sd = mean(values.tolist()), stdev(values.tolist())
    reach = quantile(1 - level / 2, count) * sd / count**0.5
    picks = np.random.default_rng(0).integers(count, size=(draws, count))
    low, high = np.quantile(values[picks].mean(axis=1), [level / 2, 1 - level / 2])
    inside = max(_upper_tail(middle + margin, sd, count), _upper_tail(margin - middle, sd, count))
    p = min(1.0, 2 * _upper_tail(abs(middle), sd, count))
    return Contrast(
        middle, sd, count, (middle - reach, middle + reach), (float(low), float(high)), p, margin, inside, p
    )


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values corrected by Holm's step-down method (Scand. J. Statist. 6, 1979), in the order they came."""
    corrected, largest = dict[str, float](), 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p))
        corrected[name] = largest
    return {name: corrected[name] for name in p_values}


def power(count: int, sd: float, effect: float, level: float) -> float:
    """Of the two-sided paired t test at this level to find a mean difference `effect`, with normal differences."""
    from scipy.stats import nct

    cut, shift = quantile(1 - level / 2, count), effect / (sd / count**0.5)
    return float(nct.sf(cut, count - 1, shift) + nct.cdf(-cut, count - 1, shift))


def quantile(probability: float, count: int) -> float:
    """Of Student's t with count − 1 degrees of freedom."""
    from scipy.stats import t

    return float(t.ppf(probability, count - 1))


def _upper_tail(distance: float, sd: float, count: int) -> float:
    """P(T > distance / standard error); differences that are all alike have no error."""
    from scipy.stats import t

    if sd == 0:
        return 0.0 if distance > 0 else (0.5 if distance == 0 else 1.0)
    return float(t.sf(distance / (sd / count**0.5), count - 1))
