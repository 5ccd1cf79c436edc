"""Patches: what does reading only the wanted pixels save, and how far are gather and scatter of tokens from a copy?

MAE's way converts and patchifies the whole image, repeats the ids to an int64 tensor of the result's size (8 bytes of
index for 2 of bf16 data), gathers, and adds with atomics in the backward pass. Floors: bytes of the kept rows, read and
written once, and the zeros or mask tokens in between.
Shapes: B images, N patches, K kept, P = p·p·3 numbers, D width of a token.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.case import Case, Outputs, Provider, Size, compiled, in_double, run_of
from benchmarks.training import random_batch
from mimir_fast.ops.patches import (
    gather_patches,
    gather_patches_reference,
    masked_targets,
    masked_targets_reference,
    patchify,
    patchify_gather,
    patchify_gather_reference,
    scatter_patches,
    scatter_patches_reference,
)

PATCH = 16
Function = Callable[..., Tensor]
# batch, image side, width of the encoder's tokens, of the decoder's
SIZES: dict[Size, tuple[int, int, int, int]] = {
    "tiny": (2, 32, 32, 32),
    "quick": (64, 224, 768, 512),
    "full": (64, 224, 768, 512),
    "gpu": (512, 224, 768, 512),
}


def cases(device: torch.device, size: Size) -> Iterator[Case]:
    """Image ops in uint8, token ops in the precision of training on this device."""
    batch, side, width, decoder_width = SIZES[size]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    targets = partial(masked_targets_reference, norm_pix=True)
    yield pixels_case(
        "patchify_gather", batch, side, 0.25, patchify_gather, patchify_gather_reference, mae_pixels, 1e-6
    )
    yield pixels_case("masked_targets", batch, side, 0.75, masked_targets, targets, mae_targets, 1e-5)
    yield gather_case(batch, (side // PATCH) ** 2, width, dtype)
    if size != "quick":
        yield scatter_case(batch, (side // PATCH) ** 2, decoder_width, dtype)


def draw_ids(batch: int, num_patches: int, num: int) -> Tensor:
    """(B, num) distinct patches of each image, ascending."""
    return torch.rand(batch, num_patches).argsort(dim=1)[:, :num].sort(dim=1).values


def repeat_gather(tokens_BND: Tensor, ids_BK: Tensor) -> Tensor:
    """The gather with materialised indices, as MAE writes it."""
    return torch.gather(tokens_BND, 1, ids_BK.unsqueeze(-1).repeat(1, 1, tokens_BND.shape[-1]))


def select_rows(tokens_BND: Tensor, ids_BK: Tensor) -> Tensor:
    """The gather as a selection of rows: indices of B·K numbers only."""
    B, N, D = tokens_BND.shape
    return tokens_BND.reshape(B * N, D).index_select(0, rows_of(ids_BK, N)).view(B, -1, D)


def xformers_gather(tokens_BND: Tensor, ids_BK: Tensor) -> Tensor:
    """xformers' row gather (Triton)."""
    from xformers.ops import index_select_cat

    B, N, D = tokens_BND.shape
    return index_select_cat([tokens_BND.reshape(B * N, D)], [rows_of(ids_BK, N)]).view(B, -1, D)


def rows_of(ids_BK: Tensor, num_patches: int) -> Tensor:
    """(B·K,): places in a batch whose images lie one after the other."""
    return (ids_BK + num_patches * torch.arange(len(ids_BK), device=ids_BK.device)[:, None]).flatten()


def mae_pixels(images: Tensor, ids: Tensor) -> Tensor:
    """The wanted patches of whole images."""
    return repeat_gather(patchify(images, PATCH), ids)


def mae_targets(images: Tensor, ids: Tensor) -> Tensor:
    """The normalised targets as MAE's code computes them."""
    out = mae_pixels(images, ids)
    return (out - out.mean(-1, keepdim=True)) / (out.var(-1, keepdim=True) + 1e-6) ** 0.5


def pixels_case(
    name: str, batch: int, side: int, part: float, ours: Function, by_definition: Function, mae_way: Function,
    tolerance: float,
) -> Case:  # fmt: skip
    """What a part of the patches becomes, read from uint8 images."""
    num_patches, patch_dim = (side // PATCH) ** 2, PATCH * PATCH * 3
    num, definition = int(num_patches * part), partial(by_definition, patch_size=PATCH)
    return Case(
        name,
        {"images": f"{batch}x3x{side}x{side}", "patch": PATCH, "taken": num, "of": num_patches, "dtype": "uint8"},
        [
            Provider("mimir_fast", run_of(partial(ours, patch_size=PATCH))),
            Provider("eager", run_of(definition)),
            Provider("MAE's way", run_of(mae_way)),
            Provider("torch.compile(eager)", run_of(compiled(definition))),
        ],
        baseline="eager",
        make_inputs=lambda: (random_batch(batch, side).images, draw_ids(batch, num_patches, num)),
        reference=lambda inputs: (definition(inputs[0].double() / 255, inputs[1]),),
        tolerance=tolerance,
        bytes=float(batch * num * (patch_dim * (1 + 4) + 8)),
        items=batch,
    )


def gather_case(batch: int, num_patches: int, width: int, dtype: torch.dtype) -> Case:
    """Visible tokens out of all, with the gradient."""
    kept, row = num_patches // 4, width * dtype.itemsize
    both_ways = partial(run_of, wanted=(0,), above=2)

    def make_inputs() -> tuple[Tensor, Tensor, Tensor]:
        tokens, grad = (torch.randn(batch, count, width).to(dtype) for count in (num_patches, kept))
        return tokens.requires_grad_(), draw_ids(batch, num_patches, kept), grad

    return Case(
        "gather_patches_fwd_bwd",
        {"tokens": f"{batch}x{num_patches}x{width}", "kept": kept, "dtype": str(dtype).removeprefix("torch.")},
        [
            Provider("mimir_fast", both_ways(gather_patches)),
            Provider("expand-gather", both_ways(gather_patches_reference)),
            Provider("MAE's repeat-gather", both_ways(repeat_gather)),
            Provider("index_select", both_ways(select_rows)),
            Provider("torch.compile(expand)", both_ways(compiled(gather_patches_reference))),
            Provider("xformers", both_ways(xformers_gather), skip="" if dtype == torch.bfloat16 else "CUDA only"),
        ],
        baseline="expand-gather",
        make_inputs=make_inputs,
        reference=both_ways(gather_patches_reference),  # a copy rounds nothing
        bytes=float(batch * (kept * row * 3 + num_patches * row)),
        items=batch,
    )


def scatter_case(batch: int, num_patches: int, width: int, dtype: torch.dtype) -> Case:
    """The decoder's input from visible tokens, mask token and positions, with both gradients."""
    kept, row = num_patches // 4, width * dtype.itemsize
    both_ways = partial(run_of, wanted=(0, 2), above=4)

    def make_inputs() -> Outputs:
        shapes = (batch, kept, width), (width,), (num_patches, width), (batch, num_patches, width)
        visible, token, positions, grad = (torch.randn(shape).to(dtype) for shape in shapes)
        return visible.requires_grad_(), draw_ids(batch, num_patches, kept), token.requires_grad_(), positions, grad

    def mae_way(visible: Tensor, ids: Tensor, token: Tensor, positions: Tensor) -> Tensor:
        """Append mask tokens, sort back with the inverse permutation, add positions."""
        rest = torch.ones(batch, num_patches, device=ids.device).scatter(1, ids, 0).argsort(dim=1, descending=True)
        restore = torch.cat([ids, rest[:, : num_patches - kept]], dim=1).argsort(dim=1)
        full = torch.cat([visible, token.expand(batch, num_patches - kept, -1)], dim=1)
        return repeat_gather(full, restore) + positions

    return Case(
        "scatter_patches_fwd_bwd",
        {"tokens": f"{batch}x{num_patches}x{width}", "visible": kept, "dtype": str(dtype).removeprefix("torch.")},
        [
            Provider("mimir_fast", both_ways(scatter_patches)),
            Provider("eager", both_ways(scatter_patches_reference)),
            Provider("MAE's way", both_ways(mae_way)),
            Provider("torch.compile(eager)", both_ways(compiled(scatter_patches_reference))),
        ],
        baseline="eager",
        make_inputs=make_inputs,
        reference=in_double(both_ways(scatter_patches_reference)),
        tolerance=1e-5 if dtype == torch.float32 else (5e-3, 5e-3, 2e-2),
        bytes=float(batch * row * (2 * num_patches + 2 * kept)),
        items=batch,
    )
