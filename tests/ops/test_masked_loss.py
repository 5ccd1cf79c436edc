"""The reconstruction loss from pixels: against its definition, in every dtype, layout and number of threads."""

import pytest
import torch
from small_images import CASES, LAYOUTS, ids_of, images_of
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from mimir_fast import _native
from mimir_fast.ops.masked_loss import masked_loss, masked_loss_reference
from mimir_fast.ops.patches import as_images, gather_patches, patchify

OPTIONS = [
    {"norm_pix": True, "kind": "l2", "reduction": "mean"},
    {"norm_pix": False, "kind": "l1", "reduction": "mean"},
    {"norm_pix": True, "kind": "l2", "reduction": "sum"},
]


def prediction_of(case: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    B, C, _, _, p, M = case
    return torch.randn(B, M, p * p * C, generator=torch.Generator().manual_seed(M)).to(dtype)


def loss_and_gradient(function, prediction: Tensor, *arguments, weight: float = 1.0, **options):
    leaf = prediction.detach().requires_grad_()
    loss = function(leaf.clone(), *arguments, **options)
    return loss.detach(), torch.autograd.grad(weight * loss, leaf)[0]


@pytest.mark.filterwarnings("ignore:var")  # of no patches at all
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pixels", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_definition(case, dtype, pixels, layout, device):
    """At most twice the error of the definition in fp32; a gradient in bf16 is the exact one, rounded once."""
    images, ids = images_of(case, pixels, layout).to(device), ids_of(case).to(device)
    prediction = prediction_of(case, dtype).to(device)
    exact_images = images.double() / 255 if pixels == torch.uint8 else images.double()
    for options in OPTIONS:
        found = loss_and_gradient(masked_loss, prediction, images, ids, case[4], **options)
        wanted = loss_and_gradient(masked_loss_reference, prediction, images, ids, case[4], **options)
        exact = loss_and_gradient(masked_loss_reference, prediction.double(), exact_images, ids, case[4], **options)
        assert [t.dtype for t in found] == [t.dtype for t in wanted]
        torch.testing.assert_close(found[0].double(), exact[0], rtol=3e-6, atol=1e-6, equal_nan=True)
        error, allowed = ((t[1].double() - exact[1]).norm() for t in (found, wanted))
        assert error <= 2 * allowed + 1e-6 * exact[1].norm()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_same_without_the_native_kernel(options, monkeypatch):
    case = CASES[1]
    results = []
    for has in (_native.has, lambda function: False):
        monkeypatch.setattr(_native, "has", has)
        results.append(loss_and_gradient(masked_loss, prediction_of(case), images_of(case), ids_of(case), 2, **options))
    for a, b in zip(*results, strict=True):
        largest = float(b.abs().max())  # the difference of two of this size is as exact as they are
        torch.testing.assert_close(a, b, rtol=1e-5, atol=4e-6 * max(1.0, largest))


def test_without_a_gradient_none_is_computed():
    prediction, images, ids = prediction_of(CASES[1]), images_of(CASES[1]), ids_of(CASES[1])
    with_gradient, _ = loss_and_gradient(masked_loss, prediction, images, ids, 2)
    assert torch.equal(masked_loss(prediction, images, ids, 2), with_gradient)
    options = 2, True, "l2", "mean"
    assert torch.ops.mimir_fast.masked_loss(prediction, images, ids, *options, False)[1].numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_threads_gives_the_same_bits(dtype):
    case, before = CASES[0], torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(
                loss_and_gradient(masked_loss, prediction_of(case, dtype), images_of(case), ids_of(case), 16)
            )
    finally:
        torch.set_num_threads(before)
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])


def test_a_scaled_loss_and_a_second_pass():
    """What the forward pass stored is neither used up nor written to."""
    case = CASES[1]
    arguments = images_of(case), ids_of(case), 2
    _, gradient = loss_and_gradient(masked_loss, prediction_of(case), *arguments)
    _, scaled = loss_and_gradient(masked_loss, prediction_of(case), *arguments, weight=0.5)
    torch.testing.assert_close(scaled, gradient / 2)
    leaf = prediction_of(case).requires_grad_()
    loss = masked_loss(leaf, *arguments)
    for times in (1, 2, 3):
        loss.backward(retain_graph=True)
        torch.testing.assert_close(leaf.grad, times * gradient)


def test_reads_patches_as_images_of_patches():
    """AEMIM's own target lies in patch space."""
    case = CASES[0]
    images, ids, prediction = images_of(case, torch.float32), ids_of(case), prediction_of(case)
    found = loss_and_gradient(masked_loss, prediction, as_images(patchify(images, 16)), ids, 1)
    for a, b in zip(found, loss_and_gradient(masked_loss, prediction, images, ids, 16), strict=True):
        assert torch.equal(a, b)


def test_images_get_a_gradient_through_their_target(device):
    images = torch.rand(2, 2, 4, 6, dtype=torch.float64, device=device, requires_grad=True)
    prediction = torch.randn(2, 3, 8, dtype=torch.float64, device=device, requires_grad=True)
    ids = torch.tensor([[4, 0, 2], [1, 5, 3]], device=device)

    def through_gather(images: Tensor) -> Tensor:
        patches = gather_patches(patchify(images, 2), ids)
        normal = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
        return (prediction - normal).square().sum()

    ours, wanted = (
        torch.autograd.grad(loss, (prediction, images))
        for loss in (masked_loss(prediction, images, ids, 2, reduction="sum"), through_gather(images))
    )
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_derivatives_of_second_order(options, device):
    images = torch.rand(2, 2, 4, 6, dtype=torch.float64, device=device)
    prediction = torch.randn(2, 3, 8, dtype=torch.float64, device=device, requires_grad=True)
    ids = torch.tensor([[4, 0, 2], [1, 5, 3]], device=device)
    assert gradcheck(lambda p: masked_loss(p, images, ids, 2, **options).square(), prediction)
    assert gradgradcheck(lambda p: masked_loss(p, images, ids, 2, **options).square(), prediction)


def test_registration(device):
    case = (2, 3, 8, 12, 4, 3)
    images, ids, prediction = images_of(case).to(device), ids_of(case).to(device), prediction_of(case).to(device)
    options = 4, True, "l2", "mean"
    for with_gradient in (False, True):
        leaf = prediction.clone().requires_grad_(with_gradient)
        torch.library.opcheck(torch.ops.mimir_fast.masked_loss, (leaf, images, ids, *options, with_gradient))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_without_graph_break(dtype, device):
    case = (2, 3, 8, 8, 4, 2)
    images, ids, prediction = images_of(case).to(device), ids_of(case).to(device), prediction_of(case, dtype).to(device)

    def loss(prediction, images, ids, patch_size):
        return 3 * masked_loss(prediction * 2, images, ids, patch_size)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = [loss_and_gradient(f, prediction, images, ids, 4) for f in (compiled, loss)]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:var")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("pixels", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("case", [(1, 3, 32, 48, 16, 5), *CASES[1:]], ids=str)
def test_triton_kernel(case, pixels, options, triton_device):
    from mimir_kernels import masked_loss as kernels

    images, ids = (
        images_of(case, pixels, "channels_last").to(triton_device),
        ids_of(case).contiguous().to(triton_device),
    )
    prediction = prediction_of(case).to(triton_device)
    gradient = torch.full_like(prediction, torch.nan)
    share = 1 / max(prediction.numel(), 1) if options["reduction"] == "mean" else 1.0
    norm_pix, absolute = options["norm_pix"], options["kind"] == "l1"
    arguments = (case[4], norm_pix, absolute, 1e-6, share)
    errors = kernels.masked_loss(prediction, images, ids, gradient, *arguments)
    loss, wanted = loss_and_gradient(masked_loss_reference, prediction, images, ids, case[4], **options)
    if prediction.numel():
        torch.testing.assert_close(errors.sum() * share, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)
    alone = kernels.masked_loss(prediction, images, ids, gradient.new_empty(0), *arguments)
    assert torch.equal(alone, errors)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_on_cuda_waits_for_nothing(dtype):
    case = CASES[0]
    images, ids, prediction = images_of(case).cuda(), ids_of(case).cuda(), prediction_of(case, dtype).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, gradient = loss_and_gradient(masked_loss, prediction, images, ids, 16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    wanted = loss_and_gradient(masked_loss_reference, prediction, images, ids, 16)
    torch.testing.assert_close(loss, wanted[0])
    torch.testing.assert_close(gradient, wanted[1])


IMAGES, IDS = torch.zeros(2, 3, 8, 8), torch.tensor([[0, 1], [2, 3]])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"prediction_BMP": torch.zeros(2, 2, 47)},
            ValueError,
            r"prediction must be .* \(2, 2, 48\), got \(2, 2, 47\)",
        ),
        ({"prediction_BMP": torch.zeros(2, 2, 48, dtype=torch.int64)}, TypeError, "floating point"),
        ({"prediction_BMP": torch.zeros(2, 2, 48, device="meta")}, ValueError, "one device"),
        ({"ids_BM": IDS + 1}, ValueError, r"ids must lie in \[0, 4\)"),
        ({"patch_size": 3}, ValueError, "not divisible"),
        ({"kind": "huber"}, ValueError, "'l2', 'l1'"),
        ({"reduction": "none"}, ValueError, "'mean', 'sum'"),
    ],
)
def test_refuses(change, error, message):
    arguments = {"prediction_BMP": torch.zeros(2, 2, 48), "images_BCHW": IMAGES, "ids_BM": IDS, "patch_size": 4}
    with pytest.raises(error, match=message):
        masked_loss(**arguments | change)


@pytest.mark.parametrize("kind", ["l2", "l1"])
def test_a_loss_scaler_saves_a_gradient_in_half_precision(kind, device):
    """One number's share of the loss, 1/(B·M·P), has few digits in float16; of an ImageNet batch it is 0."""
    case = (32, 3, 96, 96, 16, 27)
    images, ids = images_of(case).to(device), ids_of(case).to(device)
    prediction, scale = prediction_of(case, torch.float16).to(device), 2.0**16
    found = loss_and_gradient(masked_loss, prediction, images, ids, 16, kind=kind, weight=scale)
    exact = loss_and_gradient(
        masked_loss_reference, prediction.double(), images.double() / 255, ids, 16, kind=kind, weight=scale
    )
    assert found[1].dtype == torch.float16 and (found[1] != 0).double().mean() > 0.99
    torch.testing.assert_close(found[1].double(), exact[1], rtol=2e-3, atol=1e-7)
