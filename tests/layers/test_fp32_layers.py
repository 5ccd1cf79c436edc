"""Linear layers in float32 with what stands around them: the definition, any size and layout, second derivatives."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rounding import FLOAT32, assert_as_accurate
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mimir_fast import _native
from mimir_fast.layers import _fp32 as op
from mimir_fast.layers import fused
from mimir_fast.layers._fp32 import takes
from mimir_fast.layers.definitions import MlpWeights, Norm, linear_reference, mlp_reference
from mimir_fast.layers.inspection import calls
from mimir_fast.models.blocks import Block

# rows, inputs, hidden: a real one, then one, primes, more blocks of rows than one, whole vectors
SHAPES = [(100, 96, 384), (1, 1, 1), (5, 33, 47), (590, 40, 70), (64, 32, 64)]

pytestmark = pytest.mark.skipif(not _native.has("fp32_gelu"), reason="the C++ extension was not built")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    return fused.linear(op, x, weight, bias, *rest)  # type: ignore[arg-type]


def mlp(x: Tensor, norm: Norm, *weights: Tensor, residual: bool) -> Tensor:
    return fused.mlp(op, x, norm, MlpWeights(*weights), residual=residual)  # type: ignore[arg-type]


def draw(M: int, K: int, H: int) -> list[Tensor]:
    """x (M, K), then gamma, beta, W1, b1, W2, b2, and r (M, H)."""
    rng = torch.Generator().manual_seed(M + K)
    shapes = [(M, K), (K,), (K,), (H, K), (H,), (K, H), (K,), (M, H)]
    x, gamma, beta, *rest = (torch.randn(shape, generator=rng) for shape in shapes)
    rest = [t / t.shape[-1] ** 0.5 for t in rest]
    return [t.requires_grad_() for t in (x, 1 + 0.1 * gamma, beta, *rest)]


def with_gradients(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    out = function(*inputs)
    return [out, *torch.autograd.grad(out, inputs, grad.to(out.dtype))]


def assert_as_good_as_pytorch(
    fused: Callable[..., Tensor], definition: Callable[..., Tensor], inputs: list[Tensor], shape: tuple[int, ...]
) -> None:
    """Against float64, next to PyTorch's float32: output and every gradient."""
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    ours = with_gradients(fused, inputs, grad)
    theirs = with_gradients(definition, inputs, grad)
    assert all(mine.dtype == torch.float32 for mine in ours)

    def exactly(grad: Tensor, *inputs: Tensor) -> list[Tensor]:
        return with_gradients(definition, [t.requires_grad_() for t in inputs], grad)

    assert_as_accurate(ours, theirs, exactly, [grad, *inputs], FLOAT32)


def mlp_by(function: Callable[..., Tensor], residual: bool) -> Callable[..., Tensor]:
    return lambda x, gamma, beta, *rest: function(x, Norm(gamma, beta, 1e-6), *rest, residual=residual)


def linear_by(function: Callable[..., Tensor], normed: bool, residual: bool) -> Callable[..., Tensor]:
    """Of x, weight, bias, gamma, beta and residual, the last three as far as asked for."""

    def run(x: Tensor, weight: Tensor, bias: Tensor, *rest: Tensor) -> Tensor:
        norm = Norm(rest[0], rest[1], 1e-6) if normed else None
        return function(x, weight, bias, norm, rest[-1] if residual else None)

    return run


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(("M", "K", "H"), SHAPES)
def test_mlp_equals_the_definition(M: int, K: int, H: int, residual: bool) -> None:
    *inputs, _ = draw(M, K, H)
    assert_as_good_as_pytorch(mlp_by(mlp, residual), mlp_by(mlp_reference, residual), inputs, (M, K))


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("M", "K", "H"), SHAPES)
def test_linear_equals_the_definition(M: int, K: int, H: int, normed: bool, residual: bool) -> None:
    x, gamma, beta, weight, bias, _, _, r = draw(M, K, H)
    inputs = [x, weight, bias, *([gamma, beta] if normed else []), *([r] if residual else [])]
    fused, definition = (linear_by(f, normed, residual) for f in (linear, linear_reference))
    assert_as_good_as_pytorch(fused, definition, inputs, (M, H))


def test_without_bias() -> None:
    x, gamma, beta, weight, *_, residual = draw(9, 33, 47)

    def by(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, gamma, beta, weight, *r: function(x, weight, None, Norm(gamma, beta, 1e-6), *r)

    for r in ([], [residual]):
        assert_as_good_as_pytorch(by(linear), by(linear_reference), [x, gamma, beta, weight, *r], (9, 47))


def test_gelu_and_its_slope() -> None:
    """For numbers between -12 and 12, through identities as weights; the norm hands out its beta."""
    x = torch.linspace(-12, 12, 24001).double().requires_grad_()
    exact = F.gelu(x)
    (exact_slope,) = torch.autograd.grad(exact.sum(), x)
    hidden, zeros, found, slope = x.detach().float(), torch.zeros(24001), torch.empty(24001), torch.ones(24001)
    _native.run("fp32_gelu", hidden, zeros, found, 1, len(x))
    _native.run("fp32_gelu_backward", hidden, zeros, slope, 0, 0, 1, len(x))
    exact = hidden.double() * torch.special.erfc(-hidden.double() / 2**0.5) / 2
    torch.testing.assert_close(found.double(), exact, rtol=2e-5, atol=0)  # the tail too: 1e-31 at -12
    assert ((found - exact).abs() / hidden.abs().clamp(min=1)).max() < 2e-7
    assert (slope - exact_slope).abs().max() < 4e-7


def test_ends_of_the_number_line() -> None:
    x = torch.tensor([-torch.inf, -1e30, -14.0, -0.0, 0.0, 14.0, 1e30, torch.nan])
    zeros, found, slope = torch.zeros(len(x)), torch.empty(len(x)), torch.ones(len(x))
    _native.run("fp32_gelu", x, zeros, found, 1, len(x))
    _native.run("fp32_gelu_backward", x, zeros, slope, 0, 0, 1, len(x))
    leaf = x.clone().requires_grad_()
    y = F.gelu(leaf)
    torch.testing.assert_close(found, y.detach(), equal_nan=True)
    torch.testing.assert_close(slope, torch.autograd.grad(y.sum(), leaf)[0], equal_nan=True)


@pytest.mark.parametrize("function", ["mlp", "linear"])
def test_second_derivatives(function: str) -> None:
    """Of a function whose gradients are kernels: equal to the definition's in float64."""
    x, gamma, beta, weight, bias, weight2, bias2, residual = draw(7, 5, 6)
    parts = {
        "mlp": (mlp_by(mlp, True), mlp_by(mlp_reference, True), [x, gamma, beta, weight, bias, weight2, bias2]),
        "linear": (
            linear_by(linear, True, True),
            linear_by(linear_reference, True, True),
            [x, weight, bias, gamma, beta, residual],
        ),
    }
    fused, definition, inputs = parts[function]

    def penalty(run: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in inputs]
        firsts = torch.autograd.grad(run(*(2 * t for t in leaves)).sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(torch.stack([f.square().sum() for f in firsts]).sum(), leaves)

    found, exact = penalty(fused, inputs), penalty(definition, [t.double() for t in inputs])
    for mine, truth in zip(found, exact, strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-3, atol=1e-4)


def test_what_needs_no_gradient_costs_none() -> None:
    """Frozen weights (an attack) leave the input's gradient as it is; a constant input takes no product."""
    x, *parameters = draw(40, 64, 96)[:-1]
    parameters = [p.detach() for p in parameters]
    ones = torch.ones(40, 64)
    y = mlp_by(mlp, True)(x, *parameters)
    (frozen,) = torch.autograd.grad(y, x, ones)
    full = with_gradients(mlp_by(mlp, True), [x, *(p.clone().requires_grad_() for p in parameters)], ones)
    torch.testing.assert_close(frozen, full[1])

    product = 2 * 40 * 64 * 96  # FLOPs
    for needs, expected in (((True, False), 2), ((False, True), 3), ((True, True), 4)):
        inputs = [x.detach().requires_grad_(needs[0]), *(p.clone().requires_grad_(needs[1]) for p in parameters)]
        inputs[1].requires_grad_(False), inputs[2].requires_grad_(False)  # the norm's
        y = mlp_by(mlp, True)(*inputs)
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(y, [t for t in inputs if t.requires_grad], ones)
        assert counter.get_total_flops() == expected * product


def test_pieces_of_the_hidden_layer_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large inputs are worked on a few rows at a time; the last piece is short."""
    inputs = draw(100, 64, 96)[:-1]

    def everything() -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in inputs]
        return with_gradients(mlp_by(mlp, True), leaves, torch.ones(100, 64))

    whole = everything()
    monkeypatch.setattr(op, "_PIECE", 33 * 96)
    with torch.no_grad():
        torch.testing.assert_close(mlp_by(mlp, True)(*inputs), whole[0], rtol=1e-5, atol=1e-4)
    for mine, expected in zip(everything(), whole, strict=True):  # sums over 100 rows, in another order
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-4)


def test_what_is_kept_for_the_backward_pass() -> None:
    """x, two numbers a row, the hidden layer before GELU and the parameters: no normalised rows, no activations."""
    x, *parameters = draw(64, 32, 128)[:-1]
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        mlp_by(mlp, True)(x, *parameters)
    extra = sum(t.numel() for t in kept) - sum(t.numel() for t in (x, *parameters))
    assert extra == 64 * 128 + 64 * 2
    kept.clear()
    with torch.no_grad(), saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        mlp_by(mlp, True)(x, *parameters)
    assert not kept


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    """What is ours: norm, GELU, their gradients, and sums over rows. The products are the BLAS's."""
    x, gamma, beta, *_ = draw(300, 96, 96)
    norm, before, results = Norm(gamma.detach(), beta.detach(), 1e-6), torch.get_num_threads(), []
    rows = x.detach()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        normed, statistics = op._normalised(rows, norm)
        grad, activated, sums = normed.clone(), torch.empty_like(rows), op._block_sums(rows)
        _native.run("fp32_gelu_backward", rows, beta, grad, activated, sums, *rows.shape)
        to_norm = op._through_norm(grad, rows, norm, statistics, normed, True)
        results.append([normed, statistics, activated, sums.sum(0), grad, *(t for t in to_norm if t is not None)])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_layouts_and_poison() -> None:
    """Slices and expanded gradients are read right; NaN stays in its row."""
    x, *parameters = draw(36, 64, 96)[:-1]
    run = mlp_by(mlp, True)
    rows = x.detach().view(4, 9, 64)[:, 1:].requires_grad_()
    assert torch.equal(run(rows, *parameters), run(rows.contiguous(), *parameters))
    turned = rows.detach().transpose(0, 1).requires_grad_()
    torch.testing.assert_close(run(turned, *parameters), run(rows, *parameters).transpose(0, 1))
    for inputs in (rows, turned):
        (dx,) = torch.autograd.grad(run(inputs, *parameters).sum(), inputs)
        (wanted,) = torch.autograd.grad(mlp_by(mlp_reference, True)(inputs, *parameters).sum(), inputs)
        torch.testing.assert_close(dx, wanted)
    bad = rows.detach().contiguous()
    bad[2, 3, 5] = torch.nan
    out = run(bad, *parameters)
    assert out[2, 3].isnan().all() and int(out.isnan().any(-1).sum()) == 1


def test_checkpointing_and_a_graph_used_twice() -> None:
    inputs = draw(20, 16, 24)[:-1]
    run = mlp_by(mlp, True)
    wanted = with_gradients(run, inputs, torch.ones(20, 16))
    again = with_gradients(lambda *i: checkpoint(run, *i, use_reentrant=False), inputs, torch.ones(20, 16))
    out = run(*inputs)
    for _ in range(2):
        kept = [out, *torch.autograd.grad(out, inputs, torch.ones(20, 16), retain_graph=True)]
        assert all(torch.equal(a, b) for a, b in zip(wanted, kept, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(wanted, again, strict=True))


def test_it_is_for_plain_float32_tensors_on_the_cpu() -> None:
    class Shard(Tensor):
        pass

    x = torch.ones(2, 3)
    assert takes(x, None, torch.nn.Parameter(x))
    assert not takes(x, None, torch.ones(6)[::2])  # a vector is read where it lies
    assert not takes(x, x.double())
    assert not takes(x.to("meta"), None)
    assert not takes(torch.ones(0, 3), None)
    assert not takes(x.as_subclass(Shard), None)
    with torch.autocast("cpu", torch.bfloat16):
        assert not takes(x, None)


@pytest.mark.parametrize("asked", [False, True])
def test_a_block_takes_it(asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And gives what it gives without, all gradients included."""
    torch.manual_seed(0)
    block, x = Block(64, 4), torch.randn(2, 9, 64, requires_grad=True)
    ids = torch.tensor([[1, 4, 5], [0, 2, 8]]) if asked else None
    monkeypatch.setenv("MIMIR_FAST_ATTENTION", "native")
    before = calls.copy()
    leaves = [x, *block.parameters()]
    results = []
    for native in (True, False):
        monkeypatch.setattr(op, "_NATIVE", native)
        out = block(x, query_ids_BQ=ids)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert calls - before == Counter(["fp32 linear"] * 3 + ["fp32 mlp"] if asked else ["fp32 block"])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
