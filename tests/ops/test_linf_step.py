"""The L∞ step against its definition: equal bit for bit on every path."""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor

from mimir_fast import _native, linf_step
from mimir_fast.ops import linf_step as module
from mimir_fast.ops.linf_step import linf_step_reference

SHAPES = [(4, 3, 32, 32), (1,), (3, 7, 33), (2, 0, 5), (2, 49, 768), (5, 3, 17, 19)]
STEP = {"alpha": 2 / 255, "eps": 8 / 255}


def operands(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """An iterate that is partly outside the ball, a gradient with zeros and NaNs, a clean input."""
    generator = torch.Generator().manual_seed(sum(shape))
    x, noise, grad = (torch.rand(shape, generator=generator) for _ in range(3))
    grad = torch.where(grad < 0.1, 0.0, torch.where(grad > 0.95, math.nan, grad - 0.5))
    return (x + 0.1 * (noise - 0.5)).clamp(0, 1).to(dtype), grad.to(dtype), x.to(dtype)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_definition(shape, dtype, device):
    x_adv, grad, x = (tensor.to(device) for tensor in operands(shape, dtype))
    assert_same(linf_step(x_adv, grad, x, **STEP), linf_step_reference(x_adv, grad, x, **STEP))


def test_stays_in_the_ball_and_moves_uphill():
    x_adv, x = torch.full((4,), 0.5), torch.full((4,), 0.5)
    moved = linf_step(x_adv, torch.tensor([1.0, -1.0, 0.0, math.nan]), x, alpha=0.25, eps=0.125)
    assert moved.tolist() == [0.625, 0.375, 0.5, 0.5]


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_do_not_leave_the_ball(dtype, per_channel, device):
    """Rounded to the nearest number, x + 8/255 was up to half a grey level outside."""
    _, grad, x = (tensor.to(device) for tensor in operands((64, 3, 8, 8), dtype))
    eps = torch.tensor([8.0, 4.0, 1.0], device=device).view(3, 1, 1) / 255 if per_channel else 8 / 255
    moved = linf_step(x, grad, x, alpha=1.0, eps=eps, clamp=(-9.0, 9.0))
    distance = (moved.double() - x.double()).abs()
    assert (distance <= eps).all()
    # And no number between the result and the end of the ball.
    farther = torch.nextafter(moved, moved + grad.sign())
    assert ((farther.double() - x.double()).abs() > eps)[grad.abs() > 0].all()


@pytest.mark.parametrize("operand", range(3))
def test_hands_on_nan_and_inf(operand, device):
    tensors = [tensor.to(device) for tensor in operands((4, 40))]
    tensors[operand][0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    assert_same(linf_step(*tensors, **STEP), linf_step_reference(*tensors, **STEP))


def test_an_image_outside_of_the_range_is_refused(device):
    """It was moved into the range, however far: normalised images by 3.15 at eps = 0."""
    _, grad, x = (tensor.to(device) for tensor in operands((3, 40)))
    normalised = (x - 0.5) / 0.1
    moved = linf_step_reference(normalised, grad, normalised, 0.0, 0.0)
    assert_same(moved, normalised)  # nobody looks here, as on a GPU: by eps at most
    for clamp, alpha in (((-6.0, 6.0), 0.01), ((0.0, 1.0), 0.0)):
        context = pytest.raises(
            ValueError, match=r"x must lie in clamp, \[0, 1\], got numbers from -4.* to 4.*Normalized"
        )
        with context if clamp == (0.0, 1.0) and device.type == "cpu" else nullcontext():
            linf_step(normalised, grad, normalised, alpha=alpha, eps=0.0, clamp=clamp)


def test_compiled_steps_look_at_the_images_too():
    x = torch.full((2, 5), 1.5)
    compiled = torch.compile(lambda x: linf_step(x, x, x, **STEP), fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="x must lie in clamp"):
        compiled(x)


def test_eps_is_measured_on_the_data(device):
    """Images in [0, 255] have radii of up to 255."""
    x = torch.full((4,), 100.0, device=device)
    moved = linf_step(x, torch.ones_like(x), x, alpha=20.0, eps=8.0, clamp=(0.0, 255.0))
    assert moved.tolist() == [108.0] * 4


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "mixed", "transposed", "strided"])
@pytest.mark.parametrize(
    "eps_shape", [(), (1,), (3, 1, 1), (1, 3, 1, 1), (4, 1, 1, 1), (4, 1, 1, 8), (6, 8), (4, 3, 6, 8)], ids=str
)
def test_radius_per_channel_in_any_layout(eps_shape, layout, device):
    x_adv, grad, x = (tensor.to(device) for tensor in operands((4, 3, 6, 8)))
    eps = torch.rand(eps_shape, device=device) / 10
    if layout == "channels_last":
        x_adv, grad, x = (tensor.to(memory_format=torch.channels_last) for tensor in (x_adv, grad, x))
    elif layout == "mixed":
        grad = grad.to(memory_format=torch.channels_last)
    elif layout == "transposed":
        x_adv, grad, x = (tensor.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0) for tensor in (x_adv, grad, x))
    elif layout == "strided":
        x_adv, grad, x = (torch.stack([tensor, tensor], -1)[..., 0] for tensor in (x_adv, grad, x))
    result = linf_step(x_adv, grad, x, alpha=0.02, eps=eps)
    assert_same(result, linf_step_reference(x_adv, grad, x, 0.02, eps))
    assert result.stride() == torch.empty_like(x_adv).stride()


def test_in_place_and_into_a_view(device):
    x_adv, grad, x = (tensor.to(device) for tensor in operands((3, 5, 64)))
    expected = linf_step_reference(x_adv, grad, x, **STEP)
    view = torch.full((3, 64, 10), math.nan, device=device)[..., ::2].transpose(1, 2)
    assert linf_step(x_adv, grad, x, **STEP, out=view) is view
    assert linf_step(x_adv, grad, x, **STEP, out=x_adv) is x_adv
    assert_same(view, expected)
    assert_same(x_adv, expected)


def test_gradient_is_that_of_the_definition(device):
    tensors = [tensor.to(device) for tensor in operands((6, 50), torch.float64)]
    tensors[0][0] = tensors[2][0]  # eps bounds meet alpha: ties
    # On the very ends of the range the subgradient is a choice, and torch's has changed: keep away from them.
    tensors[0], tensors[2] = (tensor * 0.98 + 0.01 for tensor in (tensors[0], tensors[2]))
    weights = torch.rand_like(tensors[0])
    gradients = []
    for step in (linf_step, lambda a, g, x, alpha, eps: linf_step_reference(a, g, x, alpha, eps)):
        x_adv, grad, x = (tensor.clone().requires_grad_() for tensor in tensors)
        out = step(x_adv, grad, x, alpha=8 / 255, eps=8 / 255)
        gradients.append(torch.autograd.grad((out * weights).sum(), (x_adv, x)))
    for actual, expected in zip(*gradients, strict=True):
        assert_same(actual, expected)


def test_second_order_gradient(device):
    x_adv, grad, x = (tensor.to(device).requires_grad_() for tensor in operands((2, 9), torch.float64))
    assert torch.autograd.gradgradcheck(
        lambda a, b: linf_step(a, grad.detach().nan_to_num(), b, alpha=1e-4, eps=0.2), (x_adv, x)
    )


def test_registration(device):
    x_adv, grad, x = (tensor.to(device) for tensor in operands((3, 3, 4, 4)))
    radii = torch.full((3, 1, 1), 0.03, device=device)
    for eps_tensor in (None, radii):
        arguments = (x_adv, grad.nan_to_num(), x, eps_tensor, 0.01, 0.03, 0.0, 1.0)
        torch.library.opcheck(torch.ops.mimir_fast.linf_step, arguments)
        torch.library.opcheck(torch.ops.mimir_fast.linf_step_out, (*arguments, torch.empty_like(x)))
    leaves = (x_adv.clone().requires_grad_(), grad.nan_to_num(), x.clone().requires_grad_())
    torch.library.opcheck(torch.ops.mimir_fast.linf_step, (*leaves, None, 0.01, 0.03, 0.0, 1.0))


@pytest.mark.parametrize("eps", [8 / 255, torch.tensor([0.01, 0.02, 0.03]).reshape(3, 1, 1)], ids=["number", "radii"])
def test_compiles_without_graph_break(eps, device):
    x_adv, grad, x = (tensor.to(device) for tensor in operands((3, 3, 8, 8)))
    eps = eps.to(device) if isinstance(eps, torch.Tensor) else eps
    double = lambda a, g, b, eps: linf_step(a, g, b, alpha=0.01, eps=eps) * 2  # noqa: E731
    compiled = torch.compile(double, fullgraph=True, backend="aot_eager")
    assert_same(compiled(x_adv, grad, x, eps), linf_step(x_adv, grad, x, alpha=0.01, eps=eps) * 2)


def test_same_without_the_native_kernel(monkeypatch):
    x_adv, grad, x = operands((3, 33))
    with_kernel = linf_step(x_adv, grad, x, **STEP)
    monkeypatch.setattr(_native, "has", lambda function: False)
    assert_same(linf_step(x_adv, grad, x, **STEP), with_kernel)


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_native_kernel_on_several_threads(num_threads):
    x_adv, grad, x = operands((5, 3, 97, 101))
    eps = torch.tensor([0.01, 0.02, 0.03]).reshape(3, 1, 1)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        assert_same(linf_step(x_adv, grad, x, alpha=0.01, eps=eps), linf_step_reference(x_adv, grad, x, 0.01, eps))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)  # the interpreter's bf16 is wrong
@pytest.mark.parametrize("shape", [(1,), (3, 7, 33), (2, 3, 20, 24)], ids=str)
@pytest.mark.parametrize("per_channel", [False, True])
def test_triton_kernel(shape, per_channel, dtype, triton_device):
    from mimir_kernels import linf_step as kernels

    x_adv, grad, x = (tensor.to(triton_device) for tensor in operands(shape, dtype))
    x_adv[..., 0] = math.nan
    radii = torch.rand(shape[-1], device=triton_device) / 10 if per_channel else None
    out = torch.full_like(x, math.nan)
    kernels.linf_step(x_adv, grad, x, radii, 1, 0.02, 0.05, 0.1, 0.9, out)
    assert_same(out, linf_step_reference(x_adv, grad, x, 0.02, 0.05 if radii is None else radii, 0.1, 0.9))


def test_eps_pattern_reads_memory_order():
    eps, x = torch.rand(3, 1, 1), torch.empty(2, 3, 4, 5)
    values, inner = module.eps_pattern(eps, x)
    assert (values.tolist(), inner) == (eps.flatten().tolist(), 20)
    assert module.eps_pattern(eps, x.to(memory_format=torch.channels_last))[1] == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"eps": 8}, ValueError, "8/255, not 8"),
        ({"eps": -0.1}, ValueError, r"eps must be in \[0, 1\]"),
        ({"eps": math.nan}, ValueError, r"eps must be in \[0, 1\]"),
        ({"eps": torch.tensor(8.0)}, ValueError, "8/255, not 8"),
        ({"eps": torch.full((7,), 0.1)}, ValueError, "eps must broadcast"),
        ({"alpha": -0.1}, ValueError, "alpha must be >= 0"),
        ({"alpha": float("inf")}, ValueError, "alpha must be >= 0 and finite"),
        ({"eps": 0.6, "clamp": (0.2, 0.7)}, ValueError, r"eps must be in \[0, 0.5\], .* clamp is \[0.2, 0.7\]"),
        ({"eps": "8/255"}, TypeError, "eps must be a number or a torch.Tensor of radii, got str"),
        ({"x": np.zeros((2, 4))}, TypeError, r"x must be a torch.Tensor, got numpy.ndarray: use torch.from_numpy\(x\)"),
        ({"grad": 0.5}, TypeError, r"grad must be a torch.Tensor, got float: use torch.tensor\(grad\)"),
        ({"clamp": 1.0}, ValueError, r"clamp must be \(low, high\)"),
        ({"clamp": (1.0, 0.0)}, ValueError, "low <= high"),
        ({"x": torch.zeros(2, 3)}, ValueError, "shapes must be equal"),
        ({"x": torch.zeros(2, 4, dtype=torch.uint8)}, TypeError, r"x must be floating point, got torch.uint8"),
        ({"x": torch.zeros(2, 4, dtype=torch.float64)}, TypeError, "one dtype"),
        ({"x": torch.zeros(2, 4, device="meta")}, ValueError, "one device, got x_adv on cpu"),
        ({"out": torch.zeros(2, 4, dtype=torch.float64)}, TypeError, "out must be torch.float32"),
        ({"x_adv": torch.zeros(2, 4, requires_grad=True), "out": torch.zeros(2, 4)}, ValueError, "no gradient"),
    ],
    ids=str,
)
def test_refuses(change, error, message):
    arguments = {name: torch.zeros(2, 4) for name in ("x_adv", "grad", "x")} | STEP | change
    with pytest.raises(error, match=message):
        linf_step(**arguments)
