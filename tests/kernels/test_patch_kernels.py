"""How the kernels that read patches find their pixels."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from mimir_fast.ops.patches import patchify_gather_reference
from mimir_kernels import patches


@triton.jit
def _quotient_kernel(out_ptr, DIVISOR: tl.constexpr, LIMIT: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.arange(0, BLOCK)
    tl.store(out_ptr + n, patches.quotient(n, DIVISOR, LIMIT), mask=n < LIMIT)


@pytest.mark.parametrize("divisor", [1, 2, 3, 4, 5, 7, 12, 14, 16, 20, 31, 100])
@pytest.mark.parametrize("room", [0, 1], ids=["by multiplication", "by division"])
def test_quotient_is_exact(divisor, room, triton_device):
    limit = 2**17 // divisor + room
    out = torch.empty(limit, dtype=torch.int32, device=triton_device)
    _quotient_kernel[(1,)](out, divisor, limit, triton.next_power_of_2(limit))
    assert torch.equal(out, torch.arange(limit, dtype=torch.int32, device=triton_device) // divisor)


def test_offsets_are_as_wide_as_the_image_needs():
    def image(*strides):
        return torch.empty_strided((2, 3, 64, 64), strides, dtype=torch.uint8, device="meta")

    assert patches.offset_type(image(3 * 64**2, 64**2, 64, 1), 16) == tl.int32
    assert patches.offset_type(image(2**40, 64**2, 64, 1), 16) == tl.int32  # where an image begins is always int64
    assert patches.offset_type(image(1, 2**30, 64, 1), 16) == tl.int64
    assert patches.offset_type(image(1, 2**29, 64, 1), 16) == tl.int32


@pytest.mark.parametrize("offset", [tl.int32, tl.int64], ids=str)
def test_wide_offsets_find_the_same_pixels(offset, triton_device, monkeypatch):
    monkeypatch.setattr(patches, "offset_type", lambda images, patch_size: offset)
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 8, 12, generator=rng).to(triton_device)
    ids = torch.tensor([[5, 0, 3], [1, 4, 2]], device=triton_device)
    out = torch.full((2, 3, 48), torch.nan, device=triton_device)
    patches.patchify_gather(images, ids, out, 4, False, 0.0)
    assert torch.equal(out, patchify_gather_reference(images, ids, 4))


@pytest.mark.parametrize(
    "P, itemsize, warps", [(768, 4, 2), (768, 2, 1), (1024, 4, 4), (3072, 4, 4), (12, 4, 4), (588, 4, 4)]
)
def test_rounds_of_threads_divide_a_patch(P, itemsize, warps):
    assert patches.patch_blocks(P, itemsize)[2] == warps
