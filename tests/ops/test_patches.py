"""Patches of images: the layout, the picking on the way, the normalised targets and all their gradients."""

import pytest
import torch
from small_images import CASES, LAYOUTS, ids_of, images_of
from torch.autograd import gradcheck, gradgradcheck

from mimir_fast import _native
from mimir_fast.ops.patches import (
    masked_targets,
    masked_targets_reference,
    normalize_patches,
    patchify,
    patchify_gather,
    patchify_gather_reference,
    unpatchify,
)


def test_pixel_order_is_row_column_channel():
    images = torch.arange(2 * 4 * 4.0).reshape(1, 2, 4, 4)  # pixel (c, y, x) holds 16c + 4y + x
    assert patchify(images, 2)[0, 1].tolist() == [2, 18, 3, 19, 6, 22, 7, 23]
    assert torch.equal(unpatchify(patchify(images, 2), 2), images)
    assert torch.equal(unpatchify(patchify(images[..., :2], 2), 2, height=4), images[..., :2])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gather_matches_definition(case, dtype, layout, device):
    images, ids, p = images_of(case, dtype, layout).to(device), ids_of(case).to(device), case[4]
    patches = patchify_gather(images, ids, p)
    assert torch.equal(patches, patchify_gather_reference(images, ids, p))
    assert patches.dtype == (torch.float32 if dtype == torch.uint8 else dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gather_gradient_matches_definition(case, dtype, device):
    images, ids = images_of(case, dtype).to(device).requires_grad_(), ids_of(case).to(device)
    outputs = [f(images, ids, case[4]) for f in (patchify_gather, patchify_gather_reference)]
    weights = torch.randn_like(outputs[0])
    assert torch.equal(*(torch.autograd.grad((out * weights).sum(), images)[0] for out in outputs))


@pytest.mark.filterwarnings("ignore:var")  # of no patches at all
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_targets_are_as_exact_as_the_definition(case, dtype, layout, device):
    """Against the same formula in float64: at most twice the error of the definition in float32."""
    images, ids, p = images_of(case, dtype, layout).to(device), ids_of(case).to(device), case[4]
    target = masked_targets(images, ids, p)
    assert target.shape == (len(images), ids.shape[1], p * p * images.shape[1])
    exact_images = images.double() / 255 if dtype == torch.uint8 else images.double()
    exact = masked_targets_reference(exact_images, ids, p, True)
    error, allowed = ((t - exact).norm() for t in (target, masked_targets_reference(images, ids, p, True)))
    assert error <= 2 * allowed + 1e-6 * exact.norm()
    assert torch.equal(masked_targets(images, ids, p, norm_pix=False), patchify_gather_reference(images, ids, p))


def test_targets_have_zero_mean_and_unit_variance():
    target = masked_targets(images_of(CASES[0]), ids_of(CASES[0]), 16)
    torch.testing.assert_close(target.mean(-1), torch.zeros(2, 49), atol=1e-5, rtol=0)
    torch.testing.assert_close(target.var(-1), torch.ones(2, 49), atol=1e-3, rtol=0)


def test_a_patch_of_one_colour_has_target_zero(device):
    images = torch.full((1, 3, 8, 8), 128, dtype=torch.uint8, device=device)
    target = masked_targets(images, torch.tensor([[0, 3]], device=device), 4)
    assert target.abs().max() < 1e-3


def test_derivatives(device):
    images = torch.rand(2, 2, 4, 6, dtype=torch.float64, device=device, requires_grad=True)
    ids = torch.tensor([[4, 0, 2], [1, 5, 3]], device=device)
    for function in (
        lambda x: patchify_gather(x, ids, 2).square(),
        lambda x: masked_targets(x, ids, 2),
        lambda x: masked_targets(x, ids, 2, norm_pix=False).square(),
    ):
        assert gradcheck(function, images)
        assert gradgradcheck(function, images)


def test_gradient_of_normalised_targets(device):
    """The adversarial target of the `official` preset: the gradient reaches the masked pixels, and only them."""
    images, ids = torch.rand(2, 3, 32, 32, device=device).requires_grad_(), ids_of((2, 3, 32, 32, 4, 20)).to(device)
    weights = torch.randn(2, 20, 48, device=device)
    fused = torch.autograd.grad((masked_targets(images, ids, 4) * weights).sum(), images)[0]
    plain = normalize_patches(patchify_gather_reference(images, ids, 4))
    torch.testing.assert_close(fused, torch.autograd.grad((plain * weights).sum(), images)[0], rtol=1e-4, atol=1e-5)
    touched = patchify(fused, 4).abs().sum(-1) > 0
    assert torch.equal(touched.nonzero()[:, 1].reshape(2, 20), ids.sort().values)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_same_with_any_number_of_threads_and_without_the_native_kernel(num_threads, monkeypatch):
    images, ids = images_of((5, 3, 64, 48, 8, 30), torch.float32), ids_of((5, 3, 64, 48, 8, 30))
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        patches, target = patchify_gather(images, ids, 8), masked_targets(images, ids, 8)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(target, masked_targets(images, ids, 8))
    monkeypatch.setattr(_native, "has", lambda function: False)
    assert torch.equal(patches, patchify_gather(images, ids, 8))
    torch.testing.assert_close(target, masked_targets(images, ids, 8))


@pytest.mark.filterwarnings("ignore:var")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [(1, 3, 32, 48, 16, 5), *CASES[1:]], ids=str)
def test_triton_kernels(case, layout, dtype, triton_device):
    from mimir_kernels import patches as kernels

    (B, C, H, W, p, K), P = case, case[4] ** 2 * case[1]
    images, ids = images_of(case, dtype, layout).to(triton_device), ids_of(case).contiguous().to(triton_device)
    patches, target = (torch.full((B, K, P), torch.nan, device=triton_device) for _ in range(2))
    kernels.patchify_gather(images, ids, patches, p, False, 0.0)
    assert torch.equal(patches, patchify_gather_reference(images, ids, p))
    kernels.patchify_gather(images, ids, target, p, True, 1e-6)
    torch.testing.assert_close(target, masked_targets_reference(images, ids, p, True), rtol=1e-4, atol=5e-5)
    back = torch.zeros(B, C, H, W, device=triton_device)
    kernels.unpatchify_visible(patches, ids, back, p)
    full = torch.zeros(B, H // p * (W // p), P, device=triton_device)
    full.scatter_(1, ids.unsqueeze(-1).expand(-1, -1, P), patches)
    assert torch.equal(back, unpatchify(full, p, H))


def test_triton_reads_and_writes_nothing_for_a_wrong_id(triton_device):
    from mimir_kernels import patches as kernels

    images = torch.randint(0, 256, (1, 3, 4, 4), dtype=torch.uint8, device=triton_device)
    ids = torch.tensor([[3, -1, 4, 2**40]], device=triton_device)
    patches = torch.full((1, 4, 12), torch.nan, device=triton_device)
    kernels.patchify_gather(images, ids, patches, 2, False, 0.0)
    assert torch.equal(patches[:, :1], patchify_gather_reference(images, ids[:, :1], 2))
    assert not patches[:, 1:].any()
    back = torch.zeros(1, 3, 4, 4, device=triton_device)
    kernels.unpatchify_visible(torch.ones_like(patches), ids, back, 2)
    assert torch.equal(back[..., 2:, 2:], torch.ones(1, 3, 2, 2, device=triton_device)) and back.sum() == 12


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_registration(dtype, device):
    case = (2, 3, 8, 12, 4, 3)
    images, ids = images_of(case, dtype).to(device), ids_of(case).to(device)
    if dtype == torch.float32:
        images.requires_grad_()
        patches = torch.rand(2, 3, 48, device=device, requires_grad=True)
        torch.library.opcheck(torch.ops.mimir_fast.unpatchify_visible, (patches, ids, 4, 8, 12))
    torch.library.opcheck(torch.ops.mimir_fast.patchify_gather, (images, ids, 4, None))
    torch.library.opcheck(torch.ops.mimir_fast.patchify_gather, (images, ids, 4, 1e-6))


def test_compiles_without_graph_break(device):
    case = (2, 3, 8, 8, 4, 2)
    images, ids = images_of(case, torch.float32).to(device).requires_grad_(), ids_of(case).to(device)

    def loss(images):
        return (masked_targets(images, ids, 4) * patchify_gather(images, ids, 4)).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    actual, expected = (torch.autograd.grad(f(images), images)[0] for f in (compiled, loss))
    torch.testing.assert_close(actual, expected)


IMAGES, IDS = torch.zeros(2, 3, 8, 8), torch.tensor([[0, 1], [2, 3]])


@pytest.mark.parametrize("function", [patchify_gather, masked_targets])
@pytest.mark.parametrize(
    ("images", "ids", "patch_size", "error", "message"),
    [
        (IMAGES, IDS, 3, ValueError, "8x8 is not divisible by patch_size=3"),
        (IMAGES, IDS, 0, ValueError, "patch_size=0"),
        (IMAGES[0], IDS, 4, ValueError, r"images must be \(B, C, H, W\)"),
        (IMAGES.int(), IDS, 4, TypeError, "uint8 or floating point, got torch.int32"),
        (IMAGES, IDS + 1, 4, ValueError, r"ids must lie in \[0, 4\)"),
        (IMAGES, IDS * 0, 4, ValueError, "got a patch twice"),
        (IMAGES, IDS[:1], 4, ValueError, "B = 2"),
        (IMAGES, IDS.float(), 4, TypeError, "ids must be int64"),
    ],
)
def test_refuses(function, images, ids, patch_size, error, message):
    with pytest.raises(error, match=message):
        function(images, ids, patch_size)


def test_refuses_what_has_no_variance_or_forms_no_grid():
    with pytest.raises(ValueError, match="norm_pix=False"):
        masked_targets(IMAGES[:, :1], IDS, 1)
    with pytest.raises(ValueError, match="pass height="):
        unpatchify(torch.zeros(1, 6, 12), 2)
