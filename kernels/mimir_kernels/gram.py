"""X·Xᵀ on tensor cores, accurate enough to subtract norms from.

Shapes: N samples, D features, tiles of BLOCK×BLOCK pairs, BLOCK_D features a step, S splits of D, T lower tiles;
n_i = ‖x_i‖², g_ij = x_i·x_j.

**Precision.** The distance d²_ij = n_i + n_j − 2·g_ij subtracts numbers of its own size, and the estimators subtract
again; so Gram entries should be good to about 1e-6. Rows are moved to their middle, which removes the worst. The rest:

- *Operands.* An fp32 number is hi + lo, two bf16 numbers, to 2⁻¹⁷. The product is hi·hi + hi·lo + lo·hi: three at
  bf16's rate. (TF32 would be one product at half the rate, but Hopper's wgmma reads fp32 from shared memory and drops
  the last 13 bits: each operand shrinks by 2⁻¹² or so, a bias of 5e-4 in d².) `center_rows` writes the two planes once;
  split in here, they would pass through registers at every step, and cost as many instructions as the products take.
- *Accumulator.* Tensor cores round their running sum towards zero (Ootomo and Yokota 2022). Over D = 150,528 that is
  9,408 truncations, all one way. So each step's product starts from zero and is added to the sum on the ordinary
  cores, which round to nearest.
- *Norms.* The products left out, lo·lo, average to zero between two rows but not within one: taken from the diagonal
  of this Gram matrix, n_i would be 1.3e-6 short, and every distance with it. `center_rows` sums exact squares in fp32.

**Work.** Only tiles with i ≥ j: N²·D multiply-adds, threefold. A 128×128 tile does 3·128² of them for each 2·128
numbers (four bytes in two planes) that it reads: 96 FLOP a byte, above what Hopper's L2 needs (about 80) and below
HBM's (200), so the tiles of one split of D run side by side (t is the fast grid axis) and find their rows in L2.
N = 512 has only 10 tiles for 132 processors: hence the splits of D, as many as fill whole waves of the processors
(`num_splits`), whose partial tiles are summed in a fixed order. No atomics: on one GPU model the same input gives the
same bits.

`gram_by_library` is the same split as batched products of cuBLAS: both halves of the matrix, so 4/3 of the work.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimir_kernels.aot import CAPABILITIES, SHARED_LIMITS, AotCase
from mimir_kernels.interpret import INTERPRETED

# A split pays for its start and for a partial tile, 64 kB written once and read twice: counted on an H100's bandwidth,
# the time of some 500 features of the product (a prediction; benchmarks/hsic.py would show it wrong).
PART_COST = 512
PART_MINIMUM = 1024
SHIFT_ROWS = 16


@dataclass(frozen=True)
class TileConfig:
    """How a tile is computed; a function of the capability, not of a timing, so that bits are reproducible."""

    block: int
    block_d: int
    num_warps: int
    num_stages: int


SMALLEST = TileConfig(64, 32, 4, 4)


def gram_config(capability: int, shared_limit: int | None = None) -> TileConfig:
    """Pinned tiles: the largest that spill no register and fit the shared memory (tests/kernels/aot_table.json).

    Args:
        shared_limit: bytes a block may have on the device, if it is one that no one compiled for.
    """
    if capability < 90 or lacks_memory(capability, shared_limit):
        return SMALLEST  # mma.sync keeps operands in registers, wgmma and tcgen05 in shared memory
    if capability >= 120:  # mma.sync again
        return TileConfig(128, 32, 8, 3)
    # Before 3.9 Triton gives tcgen05 a second copy of one operand, since then one buffer fewer than stages.
    return TileConfig(128, 32, 8, 4) if capability >= 100 else TileConfig(128, 64, 8, 3)


def lacks_memory(capability: int, shared_limit: int | None) -> bool:
    """Whether a block may have less than on the GPU that the tiles of this capability were made for."""
    made_for = max(known for known in CAPABILITIES if known <= capability)
    return shared_limit is not None and shared_limit < SHARED_LIMITS[made_for]


def limits_of(device: torch.device) -> tuple[int, int | None]:
    """Capability (90 for Hopper) and shared memory of a block; for the interpreter the oldest, its tiles are small."""
    if device.type != "cuda":
        return CAPABILITIES[0], None
    known = torch.cuda.get_device_properties(device)
    shared: int = known.shared_memory_per_block_optin  # type: ignore[attr-defined]  # PyTorch's stubs lack it
    return 10 * known.major + known.minor, shared


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
def split_bf16(x, INTERPRET: tl.constexpr):
    """fp32 → hi + lo."""
    hi = round_bf16(x, INTERPRET)
    return hi, round_bf16(x - hi.to(tl.float32), INTERPRET)


@triton.jit
def accumulate(acc, a_hi, a_lo, b_hi, b_lo):
    """acc + a·b for a (M, K) and b (K, N) in halves: summed from zero, then added with rounding to nearest."""
    part = tl.zeros(acc.shape, dtype=tl.float32)
    part = tl.dot(a_hi, b_lo, part, input_precision="ieee")
    part = tl.dot(a_lo, b_hi, part, input_precision="ieee")
    part = tl.dot(a_hi, b_hi, part, input_precision="ieee")
    # An fma by one is an addition that Triton does not fold back into the tensor core's accumulator.
    return tl.fma(part, tl.full(acc.shape, 1.0, tl.float32), acc)


@triton.jit
def load_plane(ptrs, mask, INTERPRET: tl.constexpr):
    """bf16 operands; the interpreter multiplies bf16 wrongly, and bf16 numbers in fp32 exactly."""
    plane = tl.load(ptrs, mask=mask, other=0.0)
    if INTERPRET:
        plane = plane.to(tl.float32)
    return plane


@triton.jit
def gram_tile(
    hi_ptr, lo_ptr, rows, cols, num_rows, num_features, begin, end,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) tile of X·Xᵀ at the given rows and columns of x = hi + lo, over features [begin, end)."""
    features = tl.arange(0, BLOCK_D)
    a_offsets = rows[:, None].to(tl.int64) * num_features + (begin + features)[None, :]
    b_offsets = cols[None, :].to(tl.int64) * num_features + (begin + features)[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for d in range(begin, end, BLOCK_D):
        inside = features < end - d
        a_mask = (rows < num_rows)[:, None] & inside[None, :]
        b_mask = (cols < num_rows)[None, :] & inside[:, None]
        a_hi = load_plane(hi_ptr + a_offsets, a_mask, INTERPRET)
        a_lo = load_plane(lo_ptr + a_offsets, a_mask, INTERPRET)
        b_hi = load_plane(hi_ptr + b_offsets, b_mask, INTERPRET)
        b_lo = load_plane(lo_ptr + b_offsets, b_mask, INTERPRET)
        acc = accumulate(acc, a_hi, a_lo, b_hi, b_lo)
        a_offsets += BLOCK_D
        b_offsets += BLOCK_D
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
    x_ptr, stride_n, mean_ptr, hi_ptr, lo_ptr, norms_ptr, num_features, BLOCK_D: tl.constexpr, INTERPRET: tl.constexpr
):  # fmt: skip
    """One row: subtract the middle, write the halves, and sum the squares of the whole on the way."""
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for d in range(0, num_features, BLOCK_D):
        features = d + tl.arange(0, BLOCK_D)
        inside = features < num_features
        x = tl.load(x_ptr + row * stride_n + features, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, x - tl.load(mean_ptr + features, mask=inside, other=0.0), 0.0)
        hi, lo = split_bf16(x, INTERPRET)
        tl.store(hi_ptr + row * num_features + features, hi.to(tl.bfloat16), mask=inside)
        tl.store(lo_ptr + row * num_features + features, lo.to(tl.bfloat16), mask=inside)
        squares += x * x
    tl.store(norms_ptr + row, tl.sum(squares, axis=0))


class CenteredRows(NamedTuple):
    """Samples minus their middle as hi + lo, (N, D) bf16 contiguous each, and their squared norms, (N,) fp32."""

    hi_ND: Tensor
    lo_ND: Tensor
    norms_N: Tensor


def middle(x_ND: Tensor) -> Tensor:
    """(D,) fp32 among the samples: the median of some SHIFT_ROWS rows, feature by feature.

    Distances are the same from anywhere, and rounding nearly so as from the mean, for which all rows would be read; and
    a row that lies far off does not draw the middle away from the others, as it does a mean.
    """
    rows = x_ND[:: max(1, len(x_ND) // SHIFT_ROWS)]
    return rows.sort(dim=0).values[len(rows) // 2].float()


def center_rows(x_ND: Tensor, mean_D: Tensor | None = None) -> CenteredRows:
    """Centre samples (N, D) of fp32, bf16 or fp16 and any strides. Traffic: one read, one write.

    Args:
        mean_D: (D,) fp32, what to subtract instead of their `middle`.
    """
    num_rows, num_features = x_ND.shape
    x = x_ND if x_ND.stride(1) == 1 else x_ND.contiguous()
    hi = torch.empty((num_rows, num_features), dtype=torch.bfloat16, device=x.device)
    lo = torch.empty_like(hi)
    norms = torch.empty(num_rows, device=x.device)
    mean = middle(x) if mean_D is None else mean_D
    _center_rows_kernel[(num_rows,)](
        x, x.stride(0), mean, hi, lo, norms, num_features, BLOCK_D=4096, INTERPRET=INTERPRETED, num_warps=8
    )
    # A row so far off that its square overflows: distances to it would be wrong without a word.
    norms.masked_fill_(norms.isinf(), torch.nan)
    return CenteredRows(hi, lo, norms)


@triton.jit
def _gram_splits_kernel(
    hi_ptr, lo_ptr, tiles_ptr, num_rows, num_features, features_per_split, num_tiles,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Split s of lower tile t → tiles[s, t, :, :]."""
    t, s = tl.program_id(0), tl.program_id(1)
    i, j = triangular_index(t)
    offsets = tl.arange(0, BLOCK)
    begin = s * features_per_split
    end = tl.minimum(begin + features_per_split, num_features)
    gram = gram_tile(
        hi_ptr, lo_ptr, i * BLOCK + offsets, j * BLOCK + offsets, num_rows, num_features, begin, end,
        BLOCK, BLOCK, BLOCK_D, INTERPRET,
    )  # fmt: skip
    base = (s.to(tl.int64) * num_tiles + t) * BLOCK * BLOCK
    tl.store(tiles_ptr + base + offsets[:, None] * BLOCK + offsets[None, :], gram)


def processors_of(device: torch.device) -> int:
    """Streaming multiprocessors; for the interpreter those of an H100."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@lru_cache(1024)
def num_splits(num_tiles: int, length: int, processors: int) -> int:
    """Into how many parts to cut the inner dimension of `num_tiles` products, a function of the GPU model and shapes.

    All programs of a wave take the time of one, so S parts take ⌈T·S / processors⌉ waves of length/S + PART_COST. The
    least of that, and of equals the fewest parts: at N = 512 on 132 processors 13, which leaves 2 of them idle.
    """
    most = max(1, min(length // PART_MINIMUM, processors))
    return min(range(1, most + 1), key=lambda s: (-(num_tiles * s // -processors) * (PART_COST - length // -s), s))


def gram_splits(x: CenteredRows, *, config: TileConfig | None = None, splits: int | None = None) -> Tensor:
    """Partial Gram tiles (S, T, BLOCK, BLOCK) fp32; sum over S.

    Tile t is at block row i and block column j ≤ i with t = i(i+1)/2 + j; entries beyond N are zero.

    Args:
        config, splits: how to compute it, instead of what `gram_config` and `num_splits` say for this device.
    """
    num_rows, num_features = x.hi_ND.shape
    device = x.hi_ND.device
    config = config or gram_config(*limits_of(device))
    blocks = triton.cdiv(num_rows, config.block)
    num_tiles = blocks * (blocks + 1) // 2
    splits = splits or num_splits(num_tiles, num_features, processors_of(device))
    per_split = triton.cdiv(triton.cdiv(num_features, splits), config.block_d) * config.block_d
    splits = triton.cdiv(num_features, per_split)
    tiles = torch.empty((splits, num_tiles, config.block, config.block), device=device)
    _gram_splits_kernel[(num_tiles, splits)](
        x.hi_ND, x.lo_ND, tiles, num_rows, num_features, per_split, num_tiles,
        BLOCK=config.block, BLOCK_D=config.block_d, INTERPRET=INTERPRETED,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return tiles


def gram_by_library(x: CenteredRows, *, block: int = 128, chunk: int = 2048) -> Tensor:
    """What `gram_splits` gives, with one split, from batched products of the library: hi·hi + hi·lo + (hi·lo)ᵀ.

    Args:
        chunk: features summed by tensor cores alone, which truncate; chunks are added with rounding to nearest.
    """
    num_rows = len(x.hi_ND)
    cross = _product(x.hi_ND, x.lo_ND, chunk)
    gram = _product(x.hi_ND, x.hi_ND, chunk) + cross + cross.mT
    blocks = triton.cdiv(num_rows, block)
    padded = torch.nn.functional.pad(gram, (0, blocks * block - num_rows) * 2)
    tiles = padded.unflatten(0, (blocks, block)).unflatten(2, (blocks, block)).transpose(1, 2)
    i, j = torch.tril_indices(blocks, blocks, device=gram.device)
    return tiles[i, j][None].contiguous()


def products(a: CenteredRows, b: CenteredRows, *, chunk: int = 2048) -> Tensor:
    """(n, m) fp32 A·Bᵀ by batched products of the library; `chunk` as for `gram_by_library`."""
    return _threefold(a.hi_ND, a.lo_ND, b.hi_ND, b.lo_ND, chunk)


def weighted(weights_mn: Tensor, x: CenteredRows, *, chunk: int = 2048) -> Tensor:
    """(m, D) fp32 sums of the n samples, weights fp32; as `products`."""
    hi = weights_mn.bfloat16()
    return _threefold(hi, (weights_mn - hi).bfloat16(), x.hi_ND.mT, x.lo_ND.mT, chunk)


def _threefold(a_hi: Tensor, a_lo: Tensor, b_hi: Tensor, b_lo: Tensor, chunk: int) -> Tensor:
    return _product(a_hi, b_hi, chunk).add_(_product(a_hi, b_lo, chunk)).add_(_product(a_lo, b_hi, chunk))


def _product(a_nD: Tensor, b_ND: Tensor, chunk: int) -> Tensor:
    """(n, N) fp32 a·bᵀ of bf16, chunks of the features added with rounding to nearest."""
    num_features = a_nD.shape[1]
    whole = num_features // chunk * chunk
    pieces = [slice(0, whole)] if whole else []
    pieces += [slice(whole, num_features)] if whole < num_features else []
    out = torch.zeros((len(a_nD), len(b_ND)), device=a_nD.device)
    for piece in pieces:
        # (chunks, n, features), strided: nothing is copied
        a, b = (
            t[:, piece].unflatten(1, (-1, min(chunk, piece.stop - piece.start))).transpose(0, 1) for t in (a_nD, b_ND)
        )
        out += _batched_product(a, b).sum(dim=0)
    return out


def _batched_product(a: Tensor, b: Tensor) -> Tensor:
    """a·bᵀ of bf16 in fp32."""
    if a.device.type == "cuda":
        return torch.bmm(a, b.mT, out_dtype=torch.float32)
    return a.float() @ b.float().mT  # out_dtype is CUDA's


def aot_cases() -> list[AotCase]:
    """Centring of each dtype, and the split Gram kernel at each capability."""
    center = [
        AotCase(
            f"gram.center_{dtype}",
            _center_rows_kernel,
            {
                "x_ptr": f"*{dtype}",
                "stride_n": "i32",
                "mean_ptr": "*fp32",
                "hi_ptr": "*bf16",
                "lo_ptr": "*bf16",
                "norms_ptr": "*fp32",
                "num_features": "i32",
            },
            {"BLOCK_D": 4096, "INTERPRET": False},
            divisible_by_16=("stride_n", "num_features"),
            num_warps=8,
            vector_loads=True,
        )
        for dtype in ("fp32", "bf16")
    ]
    signature = {"hi_ptr": "*bf16", "lo_ptr": "*bf16", "tiles_ptr": "*fp32"}
    signature |= dict.fromkeys(("num_rows", "num_features", "features_per_split", "num_tiles"), "i32")
    return center + [
        AotCase(
            "gram.splits",
            _gram_splits_kernel,
            signature,
            {"BLOCK": config.block, "BLOCK_D": config.block_d, "INTERPRET": False},
            divisible_by_16=("num_features", "features_per_split"),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            vector_loads=True,
            tensor_cores=True,
            capabilities=(capability,),
        )
        for capability in CAPABILITIES
        for config in [gram_config(capability)]
    ]
