"""Philox4x32-10 inside a kernel, bit for bit mimir_fast/philox.py.

Triton's own `tl.philox` does the rounds; here its four words become neighbouring elements, as the definition counts
them: element e is word e % 4 of counter (e // 4, sample, step, stream).
"""

import triton
import triton.language as tl


@triton.jit
def random_bits(seed, sample, step, stream, first, NUM: tl.constexpr):
    """(NUM,) uint32 for elements first … first + NUM − 1; `first` and NUM are multiples of 4."""
    block = tl.cast(first // 4, tl.uint32) + tl.arange(0, NUM // 4).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(
        seed,
        block,
        tl.zeros_like(block) + tl.cast(sample, tl.uint32),
        tl.zeros_like(block) + tl.cast(step, tl.uint32),
        tl.zeros_like(block) + tl.cast(stream, tl.uint32),
    )
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def to_uniform(bits):
    """A multiple of 2⁻²⁴ in [0, 1) from the upper 24 bits."""
    return (bits >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08
