"""Counter-based randomness: a random number is a function of where it is used, not of what was drawn before.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11) turns a 128-bit counter and a
64-bit key into four 32-bit words. Our counter is

    (element // 4, sample, step, stream)        word number `element % 4` is the element's

and the key is the seed. So a mask, a crop or the start of an attack depends on (seed, stream, step, sample) and on
nothing else: not on the rank count, the batch it landed in, or whether the run was resumed.

This file is the definition, in plain PyTorch (int64 arithmetic, any device). It is a leaf: ops and data both use it.
Shapes: B samples, N numbers for each.
"""

from enum import IntEnum

import torch
from torch import Tensor

_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_MASK32 = 0xFFFFFFFF


class Stream(IntEnum):
    """Who draws. Two users of the same (seed, step, sample) must not see the same numbers."""

    MASK = 0
    ATTACK_MASK = 1
    ATTACK_START = 2
    ORDER = 3
    CROP = 4
    FLIP = 5
    MIX = 6
    AUGMENT = 7
    EVALUATION = 8
    DROP_PATH = 9
    MIXUP = 10
    BRANCH_GATE = 11
    PATCH_GATE = 12
    AUGMENT_STRENGTH = 13
    PERMUTATION = 14
    DECODE = 15
    ATTACK_DECODE = 16
    MASKED_NOISE = 17
    MEDIAN_ROWS = 18
    SMOOTHING = 19
    SQUARE = 20
    PAIRING = 21


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int, rounds: int = 10) -> tuple[Tensor, ...]:
    """Four uint32 words for each counter.

    Args:
        counter: four broadcastable int64 tensors holding uint32 values.
        seed: the 64-bit key.
    Returns:
        four int64 tensors with values in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(rounds):
        # The int64 product wraps modulo 2^64, which keeps all 64 bits; the shift is arithmetic, hence the mask.
        p0, p1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        high0, low0 = (p0 >> 32) & _MASK32, p0 & _MASK32
        high1, low1 = (p1 >> 32) & _MASK32, p1 & _MASK32
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL_0) & _MASK32, (k1 + _WEYL_1) & _MASK32
    return c0, c1, c2, c3


def random_bits(seed: int, stream: int, step: int | Tensor, samples_B: Tensor, num: int) -> Tensor:
    """(B, num) int64, uniform over [0, 2^32): the definition every faster generator is tested against.

    Args:
        step: one number, or a (B,) tensor when the samples of a batch are at different epochs.
        samples_B: (B,) int64 global sample indices.
    """
    device = samples_B.device
    blocks = torch.arange((num + 3) // 4, device=device).unsqueeze(0)
    samples = (samples_B.long() & _MASK32).unsqueeze(1)
    steps = steps_of(step, samples_B).unsqueeze(1) & _MASK32
    streams = torch.full_like(steps, int(stream))
    words = philox4x32((blocks, samples, steps, streams), seed)
    words = torch.broadcast_tensors(*words)
    return torch.stack(words, dim=-1).flatten(1)[:, :num]


def uniform(seed: int, stream: int, step: int | Tensor, samples_B: Tensor, num: int) -> Tensor:
    """(B, num) float32, uniform over the 2^24 multiples of 2^-24 in [0, 1). Arguments as for `random_bits`."""
    return (random_bits(seed, stream, step, samples_B, num) >> 8).to(torch.float32) * 2.0**-24


def normal(seed: int, stream: int, step: int | Tensor, samples_B: Tensor, num: int) -> Tensor:
    """(B, num) float32, standard normal by Box and Muller's transform of `uniform`. Arguments as for `random_bits`."""
    first, second = uniform(seed, stream, step, samples_B, 2 * num).chunk(2, dim=1)
    # 1 - u lies in (0, 1]: the logarithm is finite.
    return (-2 * (1 - first).log()).sqrt() * (2 * torch.pi * second).cos()


def steps_of(step: int | Tensor, samples_B: Tensor) -> Tensor:
    """(B,) int64 on the device of the samples, from one step or one a sample.

    Raises:
        ValueError: a tensor that has neither one element nor B.
    """
    if not isinstance(step, Tensor):
        return torch.full_like(samples_B, step, dtype=torch.int64)  # made there: a copy from the host would wait
    if step.numel() not in (1, len(samples_B)):
        raise ValueError(
            f"step must be one number or one for each of {len(samples_B)} samples, got {tuple(step.shape)}"
        )
    return step.to(samples_B.device, torch.int64).reshape(-1).expand(len(samples_B))


def signed_seed(seed: int) -> int:
    """The 64-bit seed as the int64 that an operator's argument can hold; the key's bits are the same.

    Raises:
        ValueError: the seed has more than 64 bits.
    """
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must fit in 64 bits, got {seed}")
    return seed - 2**64 if seed >= 2**63 else int(seed)
