"""Square attack in an L∞ ball: random squares of colour, kept where the margin falls; no gradient.

    start:   stripes of one pixel's width, every channel at −ε or ε
    query i: a square of side s = √(p(i)·H·W) at a random place, every channel's δ moved by −2ε or 2ε; kept if the
             margin z_y − max_{j≠y} z_j falls, or is at most 0 (a tie counts by who wins it)

p falls from 0.8 at the queries of AutoAttack's schedule, which is that of 10,000 queries. Andriushchenko et al., arXiv
1912.00049, Algorithms 1 and 2; parameters of AutoAttack (arXiv 2003.01690).

The squares of an image are functions of (seed, sample, query), not of its batch. So several queries of an image may be
asked at once: the first that is kept counts, those behind it are asked again from the new point. The result is that of
asking one after the other; where few images are left, a pass through the model costs hardly more for it.

Shapes: R rows, C channels, H × W pixels, K classes, Q queries at once.
"""

import time

import torch
from torch import Tensor, nn

from mimir_fast.attacks.losses import margin
from mimir_fast.attacks.pgd import check_images, image_bounds, is_correct, samples_of
from mimir_fast.attacks.rows import searched, select_all
from mimir_fast.layers.borrowing import borrowed
from mimir_fast.ops.random_uniform import random_uniform
from mimir_fast.philox import Stream
from mimir_fast.validation import check_number

P_INIT = 0.8
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Queries after which p is halved."""
BATCHES_AT_ONCE = 4
"""Batches that a pass may be as large as, for who calls in batches: it keeps no gradients."""
TRIAL = 24
"""Passes by which a number of queries at once is judged."""
TRIAL_AGAIN = 480
"""Passes after which it is chosen anew: the fewer squares are kept, the more it pays to ask many."""


@torch.no_grad()
def square(
    model: nn.Module, images: Tensor, labels: Tensor, eps: float, num_queries: int = 5000, *,
    samples: Tensor | None = None, seed: int = 0, rows: int = 0,
) -> Tensor:  # fmt: skip
    """Images (B, C, H, W) in [0, 1] within eps, misclassified where the search broke them, else as they were.

    Args:
        labels: (B,) int64.
        samples, seed: coordinates of the squares, see `pgd`.
        rows: of a pass at most, when several queries are asked at once.
    Raises:
        ValueError: these are no float images in [0, 1], or there is no query.
    """
    check_images(images, gradients=False, half=False)
    check_number("num_queries", num_queries, at_least=1)
    with borrowed(model, "eval") as module:
        right, result = is_correct(module(images), labels).nonzero()[:, 0], images.clone()
        x, known = images[right], samples_of(images, samples)[right]
        search = SquareRows(module, x, labels[right], known, eps, num_queries, seed=seed, most=rows)
        result[right] = searched(search, x, right)
        return result


class SquareRows:
    """A search of `num_queries` queries an image; see `rows.Rows`.

    Args:
        module: takes images in [0, 1], returns logits (R, K).
        samples: (R,) int64, to which the random squares belong.
        most: rows of a pass through the model, at most, when several queries are asked at once.
    """

    def __init__(
        self, module: nn.Module, images: Tensor, labels: Tensor, samples: Tensor, eps: float, num_queries: int = 5000,
        *, seed: int = 0, most: int = 0,
    ) -> None:  # fmt: skip
        self.module, self.eps, self.seed, self.num_queries = module, eps, seed, num_queries
        self.images, self.labels, self.samples = images, labels, samples
        self.low, self.high = image_bounds(images, eps)
        self.x = images
        self.asked = torch.zeros_like(labels)
        self.margin = torch.zeros(0, device=images.device)
        self.pace = Pace(max(1, most))
        self.limits = torch.tensor(HALVINGS, device=images.device)

    def finished(self) -> bool:
        """Whether all queries are asked."""
        return len(self.margin) > 0 and self.pace.least >= self.num_queries

    def step(self) -> tuple[Tensor, Tensor]:
        """One pass through the model; the first call only asks the stripes."""
        with torch.no_grad():
            if len(self.margin) == 0:
                self._stripes()
            else:
                self._ask()
        # A NaN is no margin above 0: whoever judges the point calls it wrong.
        return ~(self.margin > 0), self.x

    def select(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        select_all(self, rows, "images", "labels", "samples", "low", "high", "x", "asked", "margin")

    def _stripes(self) -> None:
        rows, channels, _, width = self.images.shape
        draws = random_uniform(self.seed, Stream.SQUARE, 0, self.samples, channels * width)
        stripes = _signs(draws).view(rows, channels, 1, width)
        self.x = (self.images + self.eps * stripes).clamp(self.low, self.high)
        self.margin = self._margins(self.x, self.labels)

    def _ask(self) -> None:
        at_once, rows = self.pace.choose(len(self.x)), torch.arange(len(self.x), device=self.x.device)
        owners = rows.repeat_interleave(at_once)
        queries = self.asked[owners] + torch.arange(at_once, device=rows.device).repeat(len(rows))
        if at_once == 1:
            new = self._squares(self.x, self.samples, queries, self.low, self.high)
            found = self._margins(new, self.labels)
            kept = ((found < self.margin) | (found <= 0)) & (queries < self.num_queries)
            used: Tensor | int = 1
        else:
            new = self._squares(self.x[owners], self.samples[owners], queries, self.low[owners], self.high[owners])
            margins = self._margins(new, self.labels[owners]).view(-1, at_once)
            better = ((margins < self.margin[:, None]) | (margins <= 0)) & (queries < self.num_queries).view(
                -1, at_once
            )
            first, kept = better.int().argmax(dim=1), better.any(dim=1)
            new, found = new.view(-1, at_once, *new.shape[1:])[rows, first], margins[rows, first]
            used = torch.where(kept, first + 1, at_once)
        self.x = torch.where(kept.view(-1, 1, 1, 1), new, self.x)
        self.margin = torch.where(kept, found, self.margin)
        self.asked = (self.asked + used).clamp(max=self.num_queries)
        self.pace.note(self.asked)

    def _squares(self, x: Tensor, samples: Tensor, queries: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """x with the squares of these queries, in the ball."""
        rows, channels, height, width = x.shape
        draws = random_uniform(self.seed, Stream.SQUARE, queries + 1, samples, 2 + channels)
        share = P_INIT * 0.5 ** (queries[:, None] > self.limits).sum(dim=1)
        side = (share * height * width).sqrt().round().clamp(1, min(height, width))[:, None]
        inside = []
        for draw, length in ((draws[:, 0:1], height), (draws[:, 1:2], width)):
            first = (draw * (length - side)).floor()
            place = torch.arange(length, device=x.device)
            inside.append((place >= first) & (place < first + side))
        square = inside[0].view(rows, 1, height, 1) & inside[1].view(rows, 1, 1, width)
        change = 2 * self.eps * _signs(draws[:, 2:]).view(rows, channels, 1, 1)
        return torch.where(square, x + change, x).clamp(low, high)

    def _margins(self, x: Tensor, labels: Tensor) -> Tensor:
        """(R,) logit of the true class less the largest other one; a tie that the true class wins is above 0."""
        logits = self.module(x)
        margins = -margin(logits, labels)
        won = (margins == 0) & is_correct(logits, labels)
        return torch.where(won, torch.finfo(margins.dtype).tiny, margins)


class Pace:
    """How many queries of an image to ask at once: what has answered most queries a second, tried now and then.

    The stopwatch decides what is asked when, not what is answered: the search is the same at any pace.
    """

    def __init__(self, most: int) -> None:
        self.most, self.least = most, 0
        self.chosen, self.best, self.trying = 1, 0.0, True
        self.passes, self.total, self.since = 0, 0.0, time.perf_counter()

    def choose(self, rows: int) -> int:
        """For the next pass."""
        return max(1, min(self.chosen, self.most // max(rows, 1)))

    def note(self, asked: Tensor) -> None:
        """After a pass: the queries asked of each row so far."""
        self.passes += 1
        every = TRIAL if self.trying else TRIAL_AGAIN
        if asked.device.type != "cpu" and self.passes % 8:
            return  # the numbers would have to be waited for
        self.least = int(asked.min()) if len(asked) else 0
        if self.passes >= every:
            self._judge(float(asked.double().mean()))

    def _judge(self, mean: float) -> None:
        now = time.perf_counter()
        speed = (mean - self.total) / max(now - self.since, 1e-9)
        if not self.trying:
            self.trying, self.best = True, speed
            self.chosen = min(2 * self.chosen, self.most)
        elif self.best == 0.0 or speed > 1.05 * self.best:
            self.best, self.chosen = speed, min(2 * self.chosen, self.most)
        else:
            self.trying, self.chosen = False, max(1, self.chosen // 2)
        self.passes, self.total, self.since = 0, mean, now


def _signs(draws: Tensor) -> Tensor:
    """−1 or 1 of numbers in [0, 1)."""
    return torch.where(draws < 0.5, -1.0, 1.0)
