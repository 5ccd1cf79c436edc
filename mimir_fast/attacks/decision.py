"""HopSkipJump: an attack that sees the predicted class and nothing else, so no gradient can mislead it.

    start     a misclassified image far away: the negative, black, white or noise, whichever is nearest once it is drawn
              to the border
    each hop  probes around the point on the border, u random:   g = mean( (φ − φ̄)·u ),  φ = ±1: misclassified or not
              steps along g (L∞: along its signs) by distance/√t, halved until misclassified, and back to the border

Chen, Jordan & Wainwright, arXiv 1904.02144, Algorithms 1 and 2, with their number of probes. Their probes are
distance/D long, which a model that rounds its images does not see; ours are much longer, and on digits no worse for
smooth models. An image is left alone once its point lies within the ball. Of the whole batch at once. Draws are
functions of (seed, hop, sample).

Shapes: B images, R of them still attacked, C channels, H × W pixels, D = C·H·W, P probes.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from mimir_fast.attacks.lp import project, size_of
from mimir_fast.attacks.pgd import check_images, image_bounds, is_correct, samples_of
from mimir_fast.layers.borrowing import borrowed
from mimir_fast.ops.random_uniform import random_uniform
from mimir_fast.philox import Stream

FIRST_PROBES = 100
FINER = 6
WIDTHS = {"linf": 1.0, "l2": 0.3}
"""Length of a probe, in L2, over the distance."""
HALVINGS = 10
NOISES = 3
_STEP = 3 << 20  # of the random numbers: apart from those of other attacks
_NUMBERS = 2**18  # of the noise of one image that are drawn at once


@torch.no_grad()
def hop_skip_jump(
    model: nn.Module, images: Tensor, labels: Tensor, eps: float, *, norm: Literal["linf", "l2"] = "linf",
    queries: int = 2000, samples: Tensor | None = None, seed: int = 0,
) -> Tensor:  # fmt: skip
    """Images (B, C, H, W) within eps and in [0, 1]: misclassified where a point so near was found.

    Args:
        model: takes images in [0, 1], returns logits (B, K), of which only the largest's place is used; left untouched.
        eps: radius in units of [0, 1]; L2 balls may have larger ones.
        queries: images that may be shown to the model for each image, about.
        samples, seed: coordinates of the random numbers, see `pgd`.
    Raises:
        ValueError: images are not float (B, C, H, W) in [0, 1].
    """
    check_images(images, gradients=False, half=False)
    samples = samples_of(images, samples)
    inside = eps * (1 - 1e-6)  # a hair, for rounding
    with borrowed(model, "eval") as module:
        asked = _Asked(module, images, labels, norm)
        points, distances = asked.starts(samples, seed)
        hop = 1
        while asked.count < queries:
            rows = ((distances > inside) & distances.isfinite()).nonzero()[:, 0]
            if len(rows) == 0:
                break
            moved = asked.hop(rows, points[rows], distances[rows], hop, samples[rows], seed)
            shorter = size_of(moved - images[rows], norm)
            better = shorter < distances[rows]
            points[rows] = torch.where(better.view(-1, 1, 1, 1), moved, points[rows])
            distances[rows] = torch.where(better, shorter, distances[rows])
            hop += 1
        if norm == "l2":
            return project(points, images, eps, "l2")
        return points.clamp(*image_bounds(images, eps))


class _Asked:
    """The model, asked about images for their classes only; counts the questions about each image."""

    def __init__(self, module: nn.Module, images: Tensor, labels: Tensor, norm: Literal["linf", "l2"]) -> None:
        self.module, self.images, self.labels, self.norm = module, images, labels, norm
        self.count, self.size = 0, images[0].numel() if len(images) else 1
        self.bisections = FINER + math.ceil(math.log2(self.size))  # the border must lie well within a probe
        self.most = max(len(images), 64)  # images a pass

    def wrong(self, x: Tensor, labels: Tensor) -> Tensor:
        """Whether each of (N, C, H, W) is misclassified, (N,) bool."""
        parts = zip(x.split(self.most), labels.split(self.most), strict=True)
        return torch.cat([~is_correct(self.module(some), of) for some, of in parts]) if len(x) else labels.bool()

    def starts(self, samples: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """The nearest misclassified point on the way to some far ones, and its distance: infinite if there is none."""
        images, every = self.images, torch.arange(len(self.images), device=self.images.device)
        far = [1 - images, torch.zeros_like(images), torch.ones_like(images)]
        far += [self._noise(samples, seed, number, 1)[:, 0] / 2 + 0.5 for number in range(NOISES)]
        points = images.clone()
        distances = images.new_full((len(images),), torch.inf)
        distances[self.wrong(images, self.labels)] = 0
        self.count += 1
        for other in far:
            rows = every[(distances > 0) & self.wrong(other, self.labels)]
            self.count += 1
            border = self.to_border(rows, other[rows])
            shorter = size_of(border - images[rows], self.norm)
            better = shorter < distances[rows]
            points[rows[better]], distances[rows[better]] = border[better], shorter[better]
        return points, distances

    def to_border(self, rows: Tensor, x: Tensor) -> Tensor:
        """The misclassified x (R, C, H, W), drawn towards its clean images as far as it stays so, by bisection."""
        clean, labels, column = self.images[rows], self.labels[rows], (-1, 1, 1, 1)
        length = size_of(x - clean, self.norm)
        near, far, best = torch.zeros_like(length), length, x

        def at(radius: Tensor) -> Tensor:
            if self.norm == "linf":
                return torch.maximum(torch.minimum(x, clean + radius.view(column)), clean - radius.view(column))
            return clean + (x - clean) * (radius / length.clamp_min(1e-12)).view(column)

        for _ in range(self.bisections):
            middle = (near + far) / 2
            tried = at(middle)
            wrong = self.wrong(tried, labels)
            near, far = torch.where(wrong, near, middle), torch.where(wrong, middle, far)
            best = torch.where(wrong.view(column), tried, best)
        self.count += self.bisections
        return best

    def hop(self, rows: Tensor, points: Tensor, distances: Tensor, hop: int, samples: Tensor, seed: int) -> Tensor:
        """Points (R, C, H, W) on the border, most of them nearer than before."""
        direction = self._direction(rows, points, distances, hop, samples, seed)
        length, column = distances / hop**0.5, (-1, 1, 1, 1)
        moved, left = points, torch.arange(len(rows), device=rows.device)
        for _ in range(HALVINGS):
            tried = (points[left] + length[left].view(column) * direction[left]).clamp(0, 1)
            wrong = self.wrong(tried, self.labels[rows[left]])
            self.count += 1
            moved = moved.index_put((left[wrong],), tried[wrong])
            left = left[~wrong]
            length = length / 2
            if len(left) == 0:
                break
        return self.to_border(rows, moved)

    def _direction(
        self, rows: Tensor, points: Tensor, distances: Tensor, hop: int, samples: Tensor, seed: int
    ) -> Tensor:  # fmt: skip
        """Estimate of the way into the other class, (R, C, H, W): of length 1 in the norm."""
        probes = int(FIRST_PROBES * hop**0.5)
        wide = (WIDTHS[self.norm] * distances).clamp_min(1e-4)
        group = max(1, min(probes, _NUMBERS // self.size))
        weighted, plain, votes = torch.zeros_like(points), torch.zeros_like(points), torch.zeros_like(distances)
        for first in range(0, probes, group):
            count = min(group, probes - first)
            noise = self._noise(samples, seed, (hop << 12) + first, count)
            noise = noise / noise.flatten(2).norm(dim=2).clamp_min(1e-12).view(*noise.shape[:2], 1, 1, 1)
            probed = (points[:, None] + wide.view(-1, 1, 1, 1, 1) * noise).clamp(0, 1)
            noise = (probed - points[:, None]) / wide.view(-1, 1, 1, 1, 1)
            labels = self.labels[rows].repeat_interleave(count)
            sides = self.wrong(probed.flatten(0, 1), labels).view(-1, count).to(points.dtype) * 2 - 1
            weighted += (sides.view(-1, count, 1, 1, 1) * noise).sum(dim=1)
            plain += noise.sum(dim=1)
            votes += sides.sum(dim=1)
        self.count += probes
        mean = votes / probes
        mixed = (mean.abs() < 1).view(-1, 1, 1, 1)
        # Where all probes agree they say on which side the border is, and the mean of the noise is all there is.
        found = torch.where(mixed, weighted - mean.view(-1, 1, 1, 1) * plain, mean.view(-1, 1, 1, 1) * plain)
        if self.norm == "linf":
            return found.sign()
        return found / found.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)

    def _noise(self, samples: Tensor, seed: int, number: int, count: int) -> Tensor:
        """(R, count, C, H, W): uniform on [−1, 1] for L∞, normal for L2."""
        shape, num = (len(samples), count, *self.images.shape[1:]), count * self.size
        uniform = self.norm == "linf" or number < NOISES
        draws = random_uniform(seed, Stream.ATTACK_START, _STEP + number, samples, num if uniform else 2 * num)
        if uniform:
            noise = 2 * draws - 1
        else:
            first, second = draws.chunk(2, dim=1)
            noise = (-2 * (1 - first).log()).sqrt() * (2 * torch.pi * second).cos()
        return noise.view(shape).to(self.images.dtype)
