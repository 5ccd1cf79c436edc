"""Randomised smoothing: a radius within which the answer of a smoothed classifier cannot change.

    g(x) = the class that f answers most often on x + σ z,  z ~ N(0, I)

    c   the most frequent class of n₀ draws
    k   how many of n further draws are of class c
    p   lower bound of P(f(x + σ z) = c) that holds with probability 1 − α (Clopper and Pearson, from k of n)
    R = σ Φ⁻¹(p): g answers c wherever ‖δ‖₂ < R, with probability 1 − α over the draws; p ≤ 1/2: it abstains

Cohen et al., arXiv 1902.02918, Theorem 1 and CERTIFY of §3.2. It is g that is certified, and not f. The noisy images
are not cut to [0, 1]: the theorem asks for Gaussian noise.

Shapes: B draws of one image, C channels, H × W pixels, K classes.
"""

from statistics import NormalDist

import torch
from torch import Tensor, nn

from mimir_fast.attacks.pgd import NO_CLASS, predicted
from mimir_fast.layers.borrowing import borrowed
from mimir_fast.ops.random_uniform import random_uniform
from mimir_fast.philox import Stream


def gaussian_noise(seed: int, draws: Tensor, sample: int, num: int) -> Tensor:
    """(B, num) float32, standard normal: a function of the seed, the image and the draw, not of the batch they are in.

    Box and Muller's transform of uniform numbers of 24 bits: no number is larger than 5.8, which a normal one is once
    in 10⁸.

    Args:
        draws: (B,) int64 numbers of the draws.
        sample: number of the image in its split.
    """
    half = (num + 1) // 2
    samples = torch.full_like(draws, sample)
    first, second = random_uniform(seed, Stream.SMOOTHING, draws, samples, 2 * half).chunk(2, dim=1)
    # 1 − u lies in (0, 1]: the logarithm is finite.
    radius, angle = (-2 * (1 - first).log()).sqrt(), 2 * torch.pi * second
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :num]


def count_classes(
    model: nn.Module, image: Tensor, sigma: float, draws: range, *, sample: int, seed: int, batch_size: int
) -> dict[int, int]:
    """Class → how often it is the answer to the image (C, H, W) with noise; NO_CLASS for answers that are not finite.

    Args:
        sigma: standard deviation of the noise, in units of images in [0, 1].
        draws: numbers of the draws; others are independent.
        batch_size: draws a forward pass.
    """
    counts: dict[int, int] = {}
    with borrowed(model, "eval") as module, torch.no_grad():
        for begin in range(draws.start, draws.stop, batch_size):
            numbers = torch.arange(begin, min(begin + batch_size, draws.stop), device=image.device)
            noise = gaussian_noise(seed, numbers, sample, image.numel()).view(-1, *image.shape)
            classes, times = predicted(module(image + sigma * noise)).unique(return_counts=True)
            for number, often in zip(classes.tolist(), times.tolist(), strict=True):
                counts[number] = counts.get(number, 0) + often
    return counts


def smoothed_answer(
    model: nn.Module, image: Tensor, sigma: float, *, select: int, draws: int, sample: int, seed: int, batch_size: int
) -> tuple[int, int]:
    """(the class c that is answered most often in the first `select` draws, its count k in the next `draws`)."""

    def count(which: range) -> dict[int, int]:
        return count_classes(model, image, sigma, which, sample=sample, seed=seed, batch_size=batch_size)

    first = count(range(select))
    guess = max(sorted(first), key=first.__getitem__)
    hits = count(range(select, select + draws)).get(guess, 0)
    return guess, 0 if guess == NO_CLASS else hits


def lower_bound(hits: int, draws: int, alpha: float) -> float:
    """A bound below the probability of a hit that holds with probability 1 − α: Clopper and Pearson 1934, one-sided.

    The p at which `hits` or more of `draws` have probability α, which is a quantile of a beta distribution.
    """
    from scipy.special import betaincinv

    return float(betaincinv(hits, draws - hits + 1, alpha)) if hits else 0.0


def certified_radius(hits: int, draws: int, sigma: float, alpha: float) -> float | None:
    """R in the L2 norm, in units of images in [0, 1]; None where the smoothed classifier abstains."""
    p = lower_bound(hits, draws, alpha)
    return sigma * NormalDist().inv_cdf(p) if p > 0.5 else None
