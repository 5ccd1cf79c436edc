"""The gradient of any function of distances: a weighted sum of differences, as one matrix product.

    out_i = −4 γ Σ_j C_ij (x_i − x_j) = −4 γ (x_i Σ_j C_ij − Σ_j C_ij x_j)        C symmetric

Shapes: N samples, D features; C arrives as a panel of P rows by N columns, so that nothing N×N need exist.

Work: 2·P·N·D FLOP (threefold on bf16 tensor cores, see gram.py); an fp32 operand is read once for BLOCK products. The
sums Σ_j C_ij ride along, as the tile of C is in registers already. Where the P×D output has too few tiles for the GPU,
the sum over j is split and the parts are added in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimir_kernels.aot import CAPABILITIES, AotCase
from mimir_kernels.gram import (
    SMALLEST,
    CenteredRows,
    TileConfig,
    accumulate,
    lacks_memory,
    limits_of,
    load_plane,
    num_splits,
    processors_of,
    split_bf16,
)
from mimir_kernels.interpret import INTERPRETED


def laplacian_config(capability: int, shared_limit: int | None = None) -> TileConfig:
    """As `gram_config`; the weights are split on the way, in registers."""
    large = 90 <= capability < 120 and not lacks_memory(capability, shared_limit)
    return TileConfig(128, 32, 8, 4) if large else SMALLEST


@triton.jit
def _laplacian_kernel(
    weights_ptr, hi_ptr, lo_ptr, gamma_ptr, out_ptr, first_row, panel_rows, num_rows, num_features, cols_per_split,
    BLOCK: tl.constexpr, BLOCK_J: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """A BLOCK×BLOCK tile of the output → out[split, row of the panel, feature]."""
    # Tiles side by side read the same features. All count along the first axis: the others end at 65,535.
    tile, split = tl.program_id(0), tl.program_id(1)
    row_blocks = tl.cdiv(panel_rows, BLOCK)
    rows = tile % row_blocks * BLOCK + tl.arange(0, BLOCK)
    features = tile // row_blocks * BLOCK + tl.arange(0, BLOCK)
    row_mask, feature_mask = (rows < panel_rows)[:, None], (features < num_features)[None, :]
    begin = split * cols_per_split
    end = tl.minimum(begin + cols_per_split, num_rows)
    cols = tl.arange(0, BLOCK_J)
    weights_ptrs = weights_ptr + rows[:, None].to(tl.int64) * num_rows + (begin + cols)[None, :]
    x_offsets = (begin + cols)[:, None].to(tl.int64) * num_features + features[None, :]
    totals = tl.zeros((BLOCK,), dtype=tl.float32)
    acc = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for j in range(begin, end, BLOCK_J):
        inside = cols < end - j
        weights = tl.load(weights_ptrs, mask=row_mask & inside[None, :], other=0.0)
        totals += tl.sum(weights, axis=1)
        weights_hi, weights_lo = split_bf16(weights, INTERPRET)
        x_hi = load_plane(hi_ptr + x_offsets, inside[:, None] & feature_mask, INTERPRET)
        x_lo = load_plane(lo_ptr + x_offsets, inside[:, None] & feature_mask, INTERPRET)
        acc = accumulate(acc, weights_hi, weights_lo, x_hi, x_lo)
        weights_ptrs += BLOCK_J
        x_offsets += BLOCK_J * tl.cast(
            num_features, tl.int64
        )  # a launcher hands over 1 as a constant, which has no .to
    inside = row_mask & feature_mask
    own = (first_row + rows)[:, None].to(tl.int64) * num_features + features[None, :]
    x_i = tl.load(hi_ptr + own, mask=inside, other=0.0).to(tl.float32)
    x_i += tl.load(lo_ptr + own, mask=inside, other=0.0).to(tl.float32)
    scale = -4.0 * tl.load(gamma_ptr).to(tl.float32)
    out_rows = split.to(tl.int64) * panel_rows + rows[:, None]
    tl.store(out_ptr + out_rows * num_features + features[None, :], scale * (totals[:, None] * x_i - acc), mask=inside)


def laplacian_product(
    weights_PN: Tensor, x: CenteredRows, gamma: Tensor, out_PD: Tensor, first_row: int,
    *, config: TileConfig | None = None, splits: int | None = None,
) -> None:  # fmt: skip
    """Write −4γ Σ_j C_ij (x_i − x_j) for rows i = first_row … first_row + P − 1.

    Args:
        weights_PN: rows of symmetric C, fp32 contiguous.    gamma: scalar tensor.
        out_PD: fp32 contiguous, overwritten.
        config, splits: as for `gram_splits`.
    """
    panel_rows, num_rows = weights_PN.shape
    num_features = x.hi_ND.shape[1]
    config = config or laplacian_config(*limits_of(x.hi_ND.device))
    num_tiles = triton.cdiv(panel_rows, config.block) * triton.cdiv(num_features, config.block)
    splits = splits or num_splits(num_tiles, num_rows, processors_of(x.hi_ND.device))
    per_split = triton.cdiv(triton.cdiv(num_rows, splits), config.block_d) * config.block_d
    splits = triton.cdiv(num_rows, per_split)
    parts = out_PD[None] if splits == 1 else out_PD.new_empty((splits, *out_PD.shape))
    _laplacian_kernel[(num_tiles, splits)](
        weights_PN, x.hi_ND, x.lo_ND, gamma, parts, first_row, panel_rows, num_rows, num_features, per_split,
        BLOCK=config.block, BLOCK_J=config.block_d, INTERPRET=INTERPRETED,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if splits > 1:
        torch.sum(parts, dim=0, out=out_PD)


def aot_cases() -> list[AotCase]:
    """The product of a panel of weights with the samples, for each capability."""
    signature = {"weights_ptr": "*fp32", "hi_ptr": "*bf16", "lo_ptr": "*bf16", "gamma_ptr": "*fp64", "out_ptr": "*fp32"}
    sizes = ("first_row", "panel_rows", "num_rows", "num_features", "cols_per_split")
    return [
        AotCase(
            "laplacian.product",
            _laplacian_kernel,
            signature | dict.fromkeys(sizes, "i32"),
            {"BLOCK": config.block, "BLOCK_J": config.block_d, "INTERPRET": False},
            divisible_by_16=sizes,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            vector_loads=True,
            tensor_cores=True,
            capabilities=(capability,),
        )
        for capability in CAPABILITIES
        for config in [laplacian_config(capability)]
    ]
