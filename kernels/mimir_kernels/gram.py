"""X·Xᵀ on tensor cores, accurate enough to subtract norms from.

Shapes: N samples, D features, tiles of BLOCK×BLOCK pairs, BLOCK_D features a step, S splits of D, T lower tiles;
n_i = ‖x_i‖², g_ij = x_i·x_j.

**Precision.** The distance d²_ij = n_i + n_j − 2·g_ij subtracts numbers of its own size, and the estimators subtract
again; so Gram entries should be good to about 1e-6. Rows arrive mean-centred fp32, which removes the worst. The rest:

- *Operands.* An fp32 number is hi + lo, two bf16 numbers, to 2⁻¹⁷. `bf16x3` multiplies hi·hi + hi·lo + lo·hi: three
  products at bf16's rate. `bf16` is hi·hi alone, good to 1e-5 where D is so large that rounding averages out. (TF32
  would be one product at half the rate, but Hopper's wgmma reads fp32 from shared memory and drops the last 13 bits:
  each operand shrinks by 2⁻¹² or so, a bias of 5e-4 in d².) `ieee` is fp32 on ordinary cores, ten times slower, for
  whoever inverts the kernel matrix.
- *Accumulator.* Tensor cores round their running sum towards zero (Ootomo and Yokota 2022). Over D = 150,528 that is
  9,408 truncations, all one way. So each step's product starts from zero and is added to the sum on the ordinary
  cores, which round to nearest.
- *Norms.* The products left out, lo·lo, average to zero between two rows but not within one: taken from the diagonal
  of this Gram matrix, n_i would be 1.3e-6 short, and every distance with it. `center_rows` sums exact squares in fp32.

**Work.** Only tiles with i ≥ j: N²·D multiply-adds, threefold with `bf16x3`. A 128×128 tile does 3·128² of them for
each 2·128 fp32 numbers it reads: 96 FLOP a byte, above what Hopper's L2 needs (about 80) and below HBM's (200), so the
tiles of one split of D run side by side (t is the fast grid axis) and find their rows in L2.
N = 512 has only 10 tiles for 132 processors: hence the splits of D, whose number depends on (N, D) alone and whose
partial tiles are summed in a fixed order. No atomics: the same input gives the same bits.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimir_kernels.aot import CAPABILITIES, AotCase
from mimir_kernels.interpret import INTERPRETED

Precision = Literal["bf16x3", "bf16", "ieee"]
TENSOR_CORE_PRECISIONS: tuple[Precision, ...] = ("bf16x3", "bf16")


@dataclass(frozen=True)
class TileConfig:
    """How a tile is computed; a function of (precision, capability), not of a timing, so that bits are reproducible."""

    block: int
    block_d: int
    num_warps: int
    num_stages: int


def gram_config(precision: Precision, capability: int) -> TileConfig:
    """Pinned tiles: the largest that leave no register spilled (tests/kernels/aot_table.json)."""
    if precision == "ieee":  # ordinary cores: the operands of both axes sit in registers
        return TileConfig(64, 32, 4, 3)
    if capability < 90:  # mma.sync keeps operands in registers, wgmma and tcgen05 in shared memory
        return TileConfig(64, 32, 8, 4) if precision == "bf16x3" else TileConfig(128, 32, 8, 4)
    return TileConfig(128, 32, 8, 4)


def capability_of(device: torch.device) -> int:
    """90 for Hopper; the interpreter (CPU) takes the oldest, whose tiles are smallest."""
    if device.type != "cuda":
        return CAPABILITIES[0]
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@triton.jit
def round_bf16(x, INTERPRET: tl.constexpr):
    """fp32 → bf16, to nearest. The interpreter truncates instead (and multiplies bf16 wrongly): there it stays fp32."""
    if INTERPRET:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        rounded = bits.to(tl.float32, bitcast=True)
    else:
        rounded = x.to(tl.bfloat16)
    return rounded


@triton.jit
def accumulate(acc, a, b, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """acc + a·b for fp32 a (M, K), b (K, N): the product is summed from zero, then added with rounding to nearest."""
    if PRECISION == "ieee":
        total = tl.dot(a, b, acc, input_precision="ieee")
    else:
        a_hi = round_bf16(a, INTERPRET)
        b_hi = round_bf16(b, INTERPRET)
        part = tl.zeros(acc.shape, dtype=tl.float32)
        if PRECISION == "bf16x3":
            a_lo = round_bf16(a - a_hi.to(tl.float32), INTERPRET)
            b_lo = round_bf16(b - b_hi.to(tl.float32), INTERPRET)
            part = tl.dot(a_hi, b_lo, part, input_precision="ieee")
            part = tl.dot(a_lo, b_hi, part, input_precision="ieee")
        part = tl.dot(a_hi, b_hi, part, input_precision="ieee")
        # An fma by one is an addition that Triton does not fold back into the tensor core's accumulator.
        total = tl.fma(part, tl.full(acc.shape, 1.0, tl.float32), acc)
    return total


@triton.jit
def gram_tile(
    x_ptr, rows, cols, num_rows, num_features, begin, end,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) tile of X·Xᵀ at the given rows and columns of contiguous x, over features [begin, end)."""
    features = tl.arange(0, BLOCK_D)
    a_ptrs = x_ptr + rows[:, None].to(tl.int64) * num_features + (begin + features)[None, :]
    b_ptrs = x_ptr + cols[None, :].to(tl.int64) * num_features + (begin + features)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for d in range(begin, end, BLOCK_D):
        inside = features < end - d
        a = tl.load(a_ptrs, mask=(rows < num_rows)[:, None] & inside[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=(cols < num_rows)[None, :] & inside[:, None], other=0.0)
        acc = accumulate(acc, a, b, PRECISION, INTERPRET)
        a_ptrs += BLOCK_D
        b_ptrs += BLOCK_D
    return acc


@triton.jit
def triangular_index(t):
    """Tile number t → (i, j) with i ≥ j, counting along the rows of the lower triangle."""
    i = ((tl.sqrt(8.0 * t.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > t, i - 1, i)  # the root is rounded: it may be one off either way
    i = tl.where((i + 1) * (i + 2) // 2 <= t, i + 1, i)
    return i, t - i * (i + 1) // 2


@triton.jit
def _center_rows_kernel(
    x_ptr, stride_n, mean_ptr, centered_ptr, norms_ptr, num_features, BLOCK_D: tl.constexpr
):  # fmt: skip
    """One row: subtract the mean, keep fp32, and sum the squares on the way."""
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for d in range(0, num_features, BLOCK_D):
        features = d + tl.arange(0, BLOCK_D)
        inside = features < num_features
        x = tl.load(x_ptr + row * stride_n + features, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, x - tl.load(mean_ptr + features, mask=inside, other=0.0), 0.0)
        tl.store(centered_ptr + row * num_features + features, x, mask=inside)
        squares += x * x
    tl.store(norms_ptr + row, tl.sum(squares, axis=0))


class CenteredRows(NamedTuple):
    """Samples minus their mean, (N, D) fp32 contiguous, and their squared norms, (N,) fp32."""

    rows_ND: Tensor
    norms_N: Tensor


def center_rows(x_ND: Tensor) -> CenteredRows:
    """Centre samples (N, D) of fp32, bf16 or fp16 and any strides. Traffic beside the mean: one read, one write."""
    num_rows, num_features = x_ND.shape
    x = x_ND if x_ND.stride(1) == 1 else x_ND.contiguous()
    centered = torch.empty((num_rows, num_features), dtype=torch.float32, device=x.device)
    norms = centered.new_empty(num_rows)
    mean = x.mean(dim=0, dtype=torch.float32)
    _center_rows_kernel[(num_rows,)](x, x.stride(0), mean, centered, norms, num_features, BLOCK_D=4096, num_warps=8)
    return CenteredRows(centered, norms)


@triton.jit
def _gram_splits_kernel(
    x_ptr, tiles_ptr, num_rows, num_features, features_per_split, num_tiles,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Split s of lower tile t → tiles[s, t, :, :]."""
    t, s = tl.program_id(0), tl.program_id(1)
    i, j = triangular_index(t)
    offsets = tl.arange(0, BLOCK)
    begin = s * features_per_split
    end = tl.minimum(begin + features_per_split, num_features)
    gram = gram_tile(
        x_ptr, i * BLOCK + offsets, j * BLOCK + offsets, num_rows, num_features, begin, end,
        BLOCK, BLOCK, BLOCK_D, PRECISION, INTERPRET,
    )  # fmt: skip
    base = (s.to(tl.int64) * num_tiles + t) * BLOCK * BLOCK
    tl.store(tiles_ptr + base + offsets[:, None] * BLOCK + offsets[None, :], gram)


def num_splits(num_rows: int, num_features: int, block: int) -> int:
    """Splits of D that fill a large GPU twice over and leave at least 1024 features each; by (N, D) alone."""
    blocks = triton.cdiv(num_rows, block)
    num_tiles = blocks * (blocks + 1) // 2
    return max(1, min(triton.cdiv(264, num_tiles), num_features // 1024))


def gram_splits(x_ND: Tensor, precision: Precision = "bf16x3") -> Tensor:
    """Partial Gram tiles (S, T, BLOCK, BLOCK) fp32 of x (N, D), fp32 contiguous; sum over S.

    Tile t is at block row i and block column j ≤ i with t = i(i+1)/2 + j; entries beyond N are zero.
    """
    num_rows, num_features = x_ND.shape
    config = gram_config(precision, capability_of(x_ND.device))
    blocks = triton.cdiv(num_rows, config.block)
    num_tiles = blocks * (blocks + 1) // 2
    splits = num_splits(num_rows, num_features, config.block)
    per_split = triton.cdiv(triton.cdiv(num_features, splits), config.block_d) * config.block_d
    splits = triton.cdiv(num_features, per_split)
    tiles = x_ND.new_empty((splits, num_tiles, config.block, config.block))
    _gram_splits_kernel[(num_tiles, splits)](
        x_ND, tiles, num_rows, num_features, per_split, num_tiles,
        BLOCK=config.block, BLOCK_D=config.block_d, PRECISION=precision, INTERPRET=INTERPRETED,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return tiles


def aot_cases() -> list[AotCase]:
    """Centring of each dtype, and the split Gram kernel at each (precision, capability)."""
    center = [
        AotCase(
            f"gram.center_{dtype}",
            _center_rows_kernel,
            {
                "x_ptr": f"*{dtype}",
                "stride_n": "i32",
                "mean_ptr": "*fp32",
                "centered_ptr": "*fp32",
                "norms_ptr": "*fp32",
            }
            | {"num_features": "i32"},
            {"BLOCK_D": 4096},
            divisible_by_16=("stride_n", "num_features"),
            num_warps=8,
            vector_loads=True,
        )
        for dtype in ("fp32", "bf16")
    ]
    signature = {"x_ptr": "*fp32", "tiles_ptr": "*fp32"}
    signature |= dict.fromkeys(("num_rows", "num_features", "features_per_split", "num_tiles"), "i32")
    return center + [
        AotCase(
            f"gram.splits_{precision}",
            _gram_splits_kernel,
            signature,
            {"BLOCK": config.block, "BLOCK_D": config.block_d, "PRECISION": precision, "INTERPRET": False},
            divisible_by_16=("num_features", "features_per_split"),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            vector_loads=True,
            tensor_cores=precision != "ieee",
            capabilities=(capability,),
        )
        for precision in (*TENSOR_CORE_PRECISIONS, "ieee")
        for capability in CAPABILITIES
        for config in [gram_config(precision, capability)]
    ]
