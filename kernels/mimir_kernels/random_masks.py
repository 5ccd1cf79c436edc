"""Random masks without a sort (see mimir_fast/ops/random_masks.py).

One program a sample. A patch is kept if fewer than K keys are smaller than its own: N² comparisons of registers, which
for N = 196 is less work than a bitonic sort, and a running sum puts the kept and the masked ids in ascending order.
Nothing but the ids touches memory.
Legend: key of patch n = (its 32 random bits, n), compared in that order, so all keys differ.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimir_kernels.aot import AotCase
from mimir_kernels.philox import random_bits

MAX_PATCHES = 1024
CHUNK = 16


@triton.jit
def _random_masks_kernel(
    samples_ptr,
    steps_ptr,
    keep_ptr,
    masked_ptr,
    num_patches,
    num_keep,
    seed,
    stream,
    SHUFFLED: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    sample, step = tl.load(samples_ptr + row), tl.load(steps_ptr + row)
    bits = random_bits(seed, sample, step, stream, 0, BLOCK)
    patch = tl.arange(0, BLOCK)
    rank = tl.zeros((BLOCK,), dtype=tl.int32)
    for first in range(0, num_patches, CHUNK):
        # The words of the others are drawn again: cheaper than a trip through shared memory.
        other_bits = random_bits(seed, sample, step, stream, first, CHUNK)[None, :]
        other = first + tl.arange(0, CHUNK)[None, :]
        smaller = (other_bits < bits[:, None]) | ((other_bits == bits[:, None]) & (other < patch[:, None]))
        rank += tl.sum((smaller & (other < num_patches)).to(tl.int32), axis=1)
    inside = patch < num_patches
    kept = inside & (rank < num_keep)
    num_kept_so_far = tl.cumsum(kept.to(tl.int32), axis=0)
    place = rank if SHUFFLED else num_kept_so_far - 1
    tl.store(keep_ptr + row * num_keep + place, patch.to(tl.int64), mask=kept)
    masked_row = masked_ptr + row * (num_patches - num_keep)
    tl.store(masked_row + patch - num_kept_so_far, patch.to(tl.int64), mask=inside & (rank >= num_keep))


def random_masks(
    samples_B: Tensor, steps_B: Tensor, num_patches: int, num_keep: int, seed: int, stream: int, shuffled: bool
) -> tuple[Tensor, Tensor]:
    """(ids_keep (B, K), ids_masked (B, N − K)) int64, N ≤ MAX_PATCHES; samples and steps contiguous int64."""
    keep, masked = (samples_B.new_empty((len(samples_B), count)) for count in (num_keep, num_patches - num_keep))
    block = max(triton.next_power_of_2(num_patches), 64)
    if len(samples_B):
        with torch.cuda.device_of(samples_B):
            _random_masks_kernel[(len(samples_B),)](
                *(samples_B, steps_B, keep, masked, num_patches, num_keep, seed, stream, shuffled, block, CHUNK),
                num_warps=_num_warps(block),
            )
    return keep, masked


def _num_warps(block: int) -> int:
    """Two patches a thread: the tile of comparisons (block × CHUNK) then fits the registers."""
    return max(block // 64, 1)


def aot_cases() -> list[AotCase]:
    """196 patches in both orders (one in stream 1, which a launcher specialises away), and the most patches."""
    pointers = dict.fromkeys(("samples_ptr", "steps_ptr", "keep_ptr", "masked_ptr"), "*i64")
    numbers = {"num_patches": "i32", "num_keep": "i32", "seed": "i64"}

    def case(name: str, shuffled: bool, block: int, stream: dict[str, str], one: dict[str, int]) -> AotCase:
        constexprs = {"SHUFFLED": shuffled, "BLOCK": block, "CHUNK": CHUNK} | one
        signature = pointers | numbers | stream
        return AotCase(f"random_masks.{name}", _random_masks_kernel, signature, constexprs, num_warps=_num_warps(block))

    return [
        case("sorted", False, 256, {"stream": "i32"}, {}),
        case("shuffled", True, 256, {}, {"stream": 1}),
        case("sorted_1024", False, MAX_PATCHES, {"stream": "i32"}, {}),
    ]
