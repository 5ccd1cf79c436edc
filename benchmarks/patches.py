"""Patches: what does reading only the wanted pixels save, and how far are gather and scatter of tokens from a copy?

MAE's way converts and patchifies the whole image, repeats the ids to an int64 tensor of the result's size (8 bytes of
index for 2 of bf16 data), gathers, and adds with atomics in the backward pass. Floors: bytes of the kept rows, read and
written once, and the zeros or mask tokens in between.
Shapes: B images, N patches, K kept, P = p·p·3 numbers, D width of a token.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Case, Outputs, Provider, Size, compiled, generator, in_double, with_gradients
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

PATCH, KEPT = 16, 0.25
Pair = tuple[Tensor, Tensor]


def cases(device: torch.device, size: Size) -> Iterator[Case]:
    """Image ops in uint8, token ops in the precision of training on this device."""
    cuda = device.type == "cuda"
    batch = 2 if size == "tiny" else 512 if cuda else 64
    side = 32 if size == "tiny" else 224
    dtype = torch.bfloat16 if cuda else torch.float32
    yield image_case(device, batch, side, targets=False)
    yield image_case(device, batch, side, targets=True)
    yield gather_case(device, batch, (side // PATCH) ** 2, 32 if size == "tiny" else 768, dtype)
    if size != "quick" or cuda:
        yield scatter_case(device, batch, (side // PATCH) ** 2, 32 if size == "tiny" else 512, dtype)


def draw_ids(batch: int, num_patches: int, num: int, device: torch.device, seed: int) -> Tensor:
    """(B, num) distinct patches of each image, ascending."""
    noise = torch.rand(batch, num_patches, device=device, generator=generator(device, seed))
    return noise.argsort(dim=1)[:, :num].sort(dim=1).values


def repeat_gather(tokens_BND: Tensor, ids_BK: Tensor) -> Tensor:
    """The gather with materialised indices, as MAE writes it."""
    return torch.gather(tokens_BND, 1, ids_BK.unsqueeze(-1).repeat(1, 1, tokens_BND.shape[-1]))


def select_rows(tokens_BND: Tensor, ids_BK: Tensor) -> Tensor:
    """The gather as a selection of rows: indices of B·K numbers only."""
    B, N, D = tokens_BND.shape
    rows = (ids_BK + N * torch.arange(B, device=ids_BK.device)[:, None]).flatten()
    return tokens_BND.reshape(B * N, D).index_select(0, rows).view(B, -1, D)


def image_case(device: torch.device, batch: int, side: int, *, targets: bool) -> Case:
    """uint8 images to visible float patches, or to normalised masked targets."""
    num_patches, patch_dim = (side // PATCH) ** 2, PATCH * PATCH * 3
    kept = int(num_patches * KEPT)
    num = num_patches - kept if targets else kept

    def make_inputs(seed: int) -> Pair:
        images = random_batch(batch, side, device, seed).images
        return images, draw_ids(batch, num_patches, num, device, seed)

    def definition(images: Tensor, ids: Tensor) -> Tensor:
        if targets:
            return masked_targets_reference(images, ids, PATCH, True)
        return patchify_gather_reference(images, ids, PATCH)

    def mae_way(images: Tensor, ids: Tensor) -> Tensor:
        out = repeat_gather(patchify(images, PATCH), ids)
        return (out - out.mean(-1, keepdim=True)) / (out.var(-1, keepdim=True) + 1e-6) ** 0.5 if targets else out

    def reference(inputs: Pair) -> Outputs:
        return (definition(inputs[0].double() / 255, inputs[1]),)

    def ours(inputs: Pair) -> Outputs:
        images, ids = inputs
        return (masked_targets(images, ids, PATCH) if targets else patchify_gather(images, ids, PATCH),)

    fused = compiled(definition)
    return Case(
        "masked_targets" if targets else "patchify_gather",
        {"images": f"{batch}x3x{side}x{side}", "patch": PATCH, "taken": num, "of": num_patches, "dtype": "uint8"},
        [
            Provider("mimir_fast", ours),
            Provider("eager", lambda inputs: (definition(*inputs),)),
            Provider("MAE's way", lambda inputs: (mae_way(*inputs),)),
            Provider("torch.compile(eager)", lambda inputs: (fused(*inputs),)),
        ],
        baseline="eager",
        make_inputs=make_inputs,
        reference=reference,
        tolerance=1e-5 if targets else 1e-6,
        bytes=float(batch * num * (patch_dim * (1 + 4) + 8)),
        items=batch,
    )


def gather_case(device: torch.device, batch: int, num_patches: int, width: int, dtype: torch.dtype) -> Case:
    """Visible tokens out of all, with the gradient."""
    kept = max(1, int(num_patches * KEPT))

    def make_inputs(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        rng = generator(device, seed)
        tokens = torch.randn(batch, num_patches, width, device=device, generator=rng).to(dtype)
        grad = torch.randn(batch, kept, width, device=device, generator=rng).to(dtype)
        return tokens.requires_grad_(), draw_ids(batch, num_patches, kept, device, seed), grad

    def both_ways(gather: Callable[..., Tensor]) -> Callable[[Any], Outputs]:
        return with_gradients(gather, 0, grad=2)

    row = width * dtype.itemsize
    return Case(
        "gather_patches_fwd_bwd",
        {"tokens": f"{batch}x{num_patches}x{width}", "kept": kept, "dtype": str(dtype).removeprefix("torch.")},
        [
            Provider("mimir_fast", both_ways(gather_patches)),
            Provider("expand-gather", both_ways(gather_patches_reference)),
            Provider("MAE's repeat-gather", both_ways(repeat_gather)),
            Provider("index_select", both_ways(select_rows)),
            Provider("torch.compile(expand)", both_ways(compiled(gather_patches_reference))),
            Provider("xformers", both_ways(xformers_gather), skip=xformers_missing(device)),
        ],
        baseline="expand-gather",
        make_inputs=make_inputs,
        reference=both_ways(gather_patches_reference),  # a copy rounds nothing
        tolerance=0.0,
        bytes=float(batch * (kept * row * 3 + num_patches * row)),
        items=batch,
    )


def scatter_case(device: torch.device, batch: int, num_patches: int, width: int, dtype: torch.dtype) -> Case:
    """The decoder's input from visible tokens, mask token and positions, with all three gradients."""
    kept = max(1, int(num_patches * KEPT))
    Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

    def make_inputs(seed: int) -> Five:
        rng = generator(device, seed)
        visible, token, positions, grad = (
            torch.randn(shape, device=device, generator=rng).to(dtype)
            for shape in ((batch, kept, width), (width,), (num_patches, width), (batch, num_patches, width))
        )
        ids = draw_ids(batch, num_patches, kept, device, seed)
        return visible.requires_grad_(), ids, token.requires_grad_(), positions, grad

    def both_ways(scatter: Callable[..., Tensor]) -> Callable[[Any], Outputs]:
        return with_gradients(scatter, 0, 2, grad=4)

    def mae_way(visible: Tensor, ids: Tensor, token: Tensor, positions: Tensor) -> Tensor:
        """Append mask tokens, sort back with the inverse permutation, add positions."""
        B, K = ids.shape
        rest = torch.ones(B, num_patches, device=ids.device).scatter(1, ids, 0).argsort(dim=1, descending=True)
        restore = torch.cat([ids, rest[:, : num_patches - K]], dim=1).argsort(dim=1)
        full = torch.cat([visible, token.expand(B, num_patches - K, -1)], dim=1)
        return repeat_gather(full, restore) + positions

    row = width * dtype.itemsize
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


def xformers_missing(device: torch.device) -> str:
    """Why xformers' index ops cannot run here; empty if they can."""
    if device.type != "cuda":
        return "xformers' index ops are CUDA only"
    try:
        from xformers.ops import index_select_cat  # noqa: F401
    except Exception as error:  # a broken binary fails in many ways
        return f"xformers does not load: {type(error).__name__}"
    return ""


def xformers_gather(tokens_BND: Tensor, ids_BK: Tensor) -> Tensor:
    """xformers' row gather (Triton)."""
    from xformers.ops import index_select_cat

    B, N, D = tokens_BND.shape
    rows = (ids_BK + N * torch.arange(B, device=ids_BK.device)[:, None]).flatten()
    return index_select_cat([tokens_BND.reshape(B * N, D)], [rows]).view(B, -1, D)
