"""Linear layers in bfloat16 with what stands around them: the definition, any size, each unit, any threads."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from rounding import BFLOAT16, assert_as_accurate
from torch import Tensor

from mimir_fast import _native
from mimir_fast.layers import _bf16 as kernels
from mimir_fast.layers import fused
from mimir_fast.layers._bf16 import weights_stay
from mimir_fast.layers.borrowing import borrowed, training_pass
from mimir_fast.layers.definitions import (
    BlockWeights,
    MlpWeights,
    Norm,
    block_reference,
    keeps,
    linear_reference,
    mlp_reference,
)
from mimir_fast.layers.inspection import calls
from mimir_fast.models.blocks import Block

UNIT = _native.run("bf16_unit") if _native.has("bf16_mlp") else ""
UNITS = {"amx": ["amx", "avx512"], "avx512": ["avx512"], "": []}[UNIT]
# tokens, inputs, hidden: a real one, then one, primes, more rows than are taken at a time, exact tiles
SHAPES = [(100, 96, 384), (1, 1, 1), (5, 33, 47), (590, 40, 70), (64, 32, 64)]

pytestmark = pytest.mark.skipif(not UNIT, reason="no bf16 unit here, or the C++ extension was not built")


@pytest.fixture(params=UNITS)
def unit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every unit that this processor has."""
    monkeypatch.setattr(kernels, "UNIT", request.param)
    yield request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32 stream", "bf16 stream"])
def stream(request: pytest.FixtureRequest) -> torch.dtype:
    """The dtype of what flows between the layers."""
    return request.param


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    return fused.linear(kernels, x, weight, bias, *rest)  # type: ignore[arg-type]


def mlp(x: Tensor, norm: Norm, *weights: Tensor, residual: bool = True) -> Tensor:
    return fused.mlp(kernels, x, norm, MlpWeights(*weights), residual=residual)  # type: ignore[arg-type]


def block(x: Tensor, weights: BlockWeights, num_heads: int) -> Tensor:
    return fused.block(kernels, x, weights, num_heads)  # type: ignore[arg-type]


def draw(M: int, K: int, H: int, stream: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """x (M, K) and gamma, beta, W1, b1, W2, b2."""
    rng = torch.Generator().manual_seed(M + K)
    shapes = [(M, K), (K,), (K,), (H, K), (H,), (K, H), (K,)]
    x, gamma, *rest = (torch.randn(shape, generator=rng) for shape in shapes)
    rest = [t / t.shape[-1] ** 0.5 for t in rest]
    return x.to(stream).requires_grad_(), [t.requires_grad_() for t in (1 + 0.1 * gamma, *rest)]


def with_gradients(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    out = function(*inputs)
    return [out, *torch.autograd.grad(out, inputs, grad.to(out.dtype))]


def assert_as_good_as_autocast(
    fused: Callable[..., Tensor], definition: Callable[..., Tensor], inputs: list[Tensor], shape: tuple[int, ...]
) -> None:
    """Against float64, next to PyTorch's autocast: output and every gradient."""
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    ours = with_gradients(fused, inputs, grad)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = with_gradients(definition, [t.detach().requires_grad_() for t in inputs], grad)
    assert [t.dtype for t in ours[1:]] == [t.dtype for t in inputs]

    def exactly(grad: Tensor, *inputs: Tensor) -> list[Tensor]:
        return with_gradients(definition, [t.requires_grad_() for t in inputs], grad)

    assert_as_accurate(ours, theirs, exactly, [grad, *inputs], BFLOAT16)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(("M", "K", "H"), SHAPES)
def test_mlp_equals_the_definition(M: int, K: int, H: int, residual: bool, stream: torch.dtype, unit: str) -> None:
    x, parameters = draw(M, K, H, stream)

    def by(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, gamma, beta, *rest: function(x, Norm(gamma, beta, 1e-6), *rest, residual=residual)

    assert_as_good_as_autocast(by(mlp), by(mlp_reference), [x, *parameters], (M, K))
    assert by(mlp)(x, *parameters).dtype == (stream if residual else torch.bfloat16)


def test_gelu_and_its_slope_are_right_to_the_last_place_of_bfloat16(unit: str) -> None:
    """For every bfloat16 between -9 and 9, through identities as weights; the norm hands out its beta."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).double()
    for x in numbers[(numbers.abs() <= 9) & (numbers.abs() > 1e-30)].split(1024):
        K, x = len(x), x.requires_grad_()
        identity, zeros, bias = torch.eye(K), torch.zeros(K), torch.zeros(K, requires_grad=True)
        norm = Norm(zeros, x.detach().float(), 1e-6)
        found = mlp(torch.zeros(1, K), norm, identity, bias, identity, zeros, residual=False)[0].double()
        exact = torch.nn.functional.gelu(x)
        slopes = (torch.autograd.grad(y.sum(), at)[0].double() for y, at in ((found, bias), (exact, x)))
        torch.testing.assert_close(found, exact, rtol=1.02 * 2**-8, atol=1e-9)
        torch.testing.assert_close(*slopes, rtol=1.02 * 2**-8, atol=1e-5)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("M", "K", "H"), SHAPES)
def test_linear_equals_the_definition(M: int, K: int, H: int, normed: bool, stream: torch.dtype, unit: str) -> None:
    x, (gamma, beta, weight, bias, *_) = draw(M, K, H, stream)
    residual = torch.randn(M, H, generator=torch.Generator().manual_seed(2)).to(stream).requires_grad_()

    def by(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, *norm: Tensor) -> Tensor:
            return function(x, weight, bias, Norm(*norm, 1e-6) if norm else None, residual)

        return run

    norm = [gamma, beta] if normed else []
    assert_as_good_as_autocast(by(linear), by(linear_reference), [x, weight, bias, residual, *norm], (M, H))
    plain = linear(x, weight, None)
    assert plain.dtype == torch.bfloat16
    torch.testing.assert_close(plain.float(), x.float() @ weight.T, rtol=2e-2, atol=5e-2)


def test_an_attack_gets_the_inputs_gradient_and_nothing_else(unit: str) -> None:
    x, parameters = draw(40, 64, 96, torch.float32)
    norm, rest = Norm(*parameters[:2], 1e-6), parameters[2:]
    frozen = [p.detach() for p in parameters]
    for function in (
        lambda x, norm, rest: mlp(x, norm, *rest),
        lambda x, norm, rest: linear(x, rest[0], rest[1], norm),
    ):
        (free,) = torch.autograd.grad(function(x, norm, rest).float().square().sum(), x)
        (fixed,) = torch.autograd.grad(
            function(x, Norm(*frozen[:2], 1e-6), frozen[2:]).float().square().sum(), x
        )  # fmt: skip
        assert torch.equal(free, fixed)
        assert all(p.grad is None for p in parameters)


def test_nothing_is_kept_where_no_gradient_is_wanted(unit: str) -> None:
    x, parameters = draw(40, 64, 96, torch.float32)
    norm, weights = Norm(*parameters[:2], 1e-6), MlpWeights(*parameters[2:])
    bare, kept = (kernels.mlp_forward(x.detach(), norm, weights, residual=True, keep=keep) for keep in (False, True))
    assert bare[1][0] is None and kept[1][0] is not None
    assert torch.equal(bare[0], kept[0])
    assert not keeps(x.detach(), None) and keeps(x, None)
    with torch.no_grad():
        assert not keeps(x, None)


def test_bits_do_not_depend_on_the_number_of_threads(unit: str, stream: torch.dtype) -> None:
    x, (gamma, beta, *rest) = draw(300, 96, 160, stream)
    norm, before, results = Norm(gamma, beta, 1e-6), torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        out = mlp(linear(x, torch.eye(96), None, norm, x), norm, *rest)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), [x, gamma, beta, *rest])])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_layouts_and_poison(unit: str) -> None:
    """A slice that is not dense is read right; NaN stays in its row."""
    x, (gamma, beta, *rest) = draw(36, 64, 96, torch.float32)
    norm = Norm(gamma, beta, 1e-6)
    rows = x.detach().view(4, 9, 64)[:, 1:]
    assert torch.equal(mlp(rows, norm, *rest), mlp(rows.contiguous(), norm, *rest))
    bad = rows.contiguous()
    bad[2, 3, 5] = torch.nan
    out = mlp(bad, norm, *rest)
    assert out[2, 3].isnan().all() and int(out.isnan().any(-1).sum()) == 1


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each time that a weight was packed: whether for the backward pass."""
    found, pack = [], kernels.pack

    def noting(weight: Tensor, *, back: bool) -> Tensor:
        found.append(back)
        return pack(weight, back=back)

    monkeypatch.setattr(kernels, "pack", noting)
    return found


def test_weights_are_packed_once_where_they_stay_and_afresh_elsewhere(packs: list[bool]) -> None:
    weight, x = torch.nn.Parameter(torch.randn(32, 32), requires_grad=False), torch.randn(8, 32)
    with weights_stay():
        linear(x, weight, None)
        with weights_stay():
            linear(x, weight, None)
        linear(x, weight, None)
        assert len(packs) == 1
        linear(x, weight[:16], None)
        linear(x, weight[16:], None)
        assert len(packs) == 3  # slices are weights of their own
        linear(x, weight.detach() * 2, None)
        linear(x, weight.detach() * 2, None)
        assert len(packs) == 5  # no parameters, as under functional_call: not kept
        weight.mul_(2)
        linear(x, weight, None)
        assert len(packs) == 6  # changed all the same
    before = linear(x, weight, None)
    weight.data.mul_(2)  # by a way that leaves no version behind
    torch.testing.assert_close(linear(x, weight, None), 2 * before)
    assert packs == [False] * 8


def test_an_attack_and_its_training_pass_share_what_is_packed(packs: list[bool]) -> None:
    layer, x = torch.nn.Linear(32, 32), torch.randn(8, 32, requires_grad=True)
    for steps in (1, 2):
        with training_pass(layer, reduces=True):
            with borrowed(layer) as module:
                for _ in range(3):
                    torch.autograd.grad(linear(x, module.weight, module.bias).float().sum(), x)
            linear(x, layer.weight, layer.bias).float().sum().backward()
            assert not kernels._scope.packed  # nor do panels outlive their last use
        assert packs == [False, True] * steps
        layer.weight.data.add_(layer.weight.grad)  # by a way that leaves no version behind


def draw_block(B: int, T: int, D: int, stream: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """x (B, T, D) and the weights of a block with an MLP twice as wide."""
    rng = torch.Generator().manual_seed(T)
    shapes = [(D,), (D,), (3 * D, D), (3 * D,), (D, D), (D,), (D,), (D,), (2 * D, D), (2 * D,), (D, 2 * D), (D,)]
    weights = [torch.randn(shape, generator=rng) / shape[-1] ** 0.5 for shape in shapes]
    weights[0], weights[6] = weights[0] + 1, weights[6] + 1
    x = torch.randn(B, T, D, generator=rng).to(stream)
    return x.requires_grad_(), [w.requires_grad_() for w in weights]


@pytest.mark.parametrize(("B", "T", "D", "heads"), [(2, 50, 64, 2), (1, 1, 8, 1), (3, 17, 40, 5)])
def test_block_equals_the_definition(B: int, T: int, D: int, heads: int, stream: torch.dtype, unit: str) -> None:
    x, weights = draw_block(B, T, D, stream)

    def by(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, *weights: function(x, BlockWeights(*weights), heads)

    assert_as_good_as_autocast(by(block), by(block_reference), [x, *weights], (B, T, D))


def test_a_block_gives_what_is_wanted_and_no_more(unit: str) -> None:
    """Frozen weights, some frozen weights, no bias of q, k and v: the gradients there are stay the same to the bit."""
    x, weights = draw_block(2, 9, 32, torch.float32)

    def gradients(wanted: list[Tensor], weights: list[Tensor]) -> tuple[Tensor, ...]:
        out = block(x, BlockWeights(*weights), 4)
        return torch.autograd.grad(out.square().sum(), wanted)

    everything = gradients([x, *weights], weights)
    (frozen,) = gradients([x], [w.detach() for w in weights])
    assert torch.equal(frozen, everything[0])
    some = [w if i in (2, 8) else w.detach() for i, w in enumerate(weights)]
    found = gradients([x, weights[2], weights[8]], some)
    assert all(torch.equal(a, b) for a, b in zip(found, (everything[0], everything[3], everything[9]), strict=True))
    weights[3] = torch.zeros_like(weights[3])
    with_zeros = block(x, BlockWeights(*weights), 4)
    assert torch.equal(with_zeros, block(x, BlockWeights(*weights)._replace(qkv_bias=None), 4))


@pytest.mark.parametrize("asked", [False, True])
def test_a_block_takes_it_under_autocast_and_only_there(asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, x = Block(64, 4), torch.randn(2, 9, 64)
    ids = torch.tensor([[1, 4, 5], [0, 2, 8]]) if asked else None
    before: Counter[str] = Counter()

    def taken() -> Counter[str]:
        """In bf16, since it was asked last."""
        new = Counter({name: count for name, count in (calls - before).items() if name.startswith("bf16")})
        before.update(calls - before)
        return new

    taken()
    monkeypatch.setenv("MIMIR_FAST_ATTENTION", "native")
    apart = Counter(["bf16 linear"] * (3 if asked else 2) + ["bf16 mlp"])
    exact = layer(x, query_ids_BQ=ids)
    assert not taken()
    with torch.autocast("cpu", torch.bfloat16):
        fast = layer(x, query_ids_BQ=ids)
        assert taken() == (apart if asked else Counter(["bf16 block"]))
        monkeypatch.setenv("MIMIR_FAST_ATTENTION", "sdpa")
        other = layer(x, query_ids_BQ=ids)
        assert taken() == apart
        monkeypatch.setattr(kernels, "UNIT", "")
        slow = layer(x, query_ids_BQ=ids)
        assert not taken()
    assert fast.dtype == slow.dtype == torch.float32
    for quick in (fast, other):
        assert (quick - exact).norm() <= 1.5 * (slow - exact).norm()


@pytest.mark.parametrize("function", ["linear", "mlp", "block"])
def test_second_derivatives(function: str, unit: str) -> None:
    """Beyond the first through the definition in bf16: as far from float64 as autocast's, twice at most."""
    x, weights = draw_block(2, 9, 32, torch.float32)
    norm = Norm(weights[0], weights[1], 1e-6)
    whole = BlockWeights(*weights)
    runs: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
        "linear": (
            lambda x: linear(x, whole.qkv, whole.qkv_bias, norm),
            lambda x: linear_reference(x, whole.qkv, whole.qkv_bias, norm),
        ),
        "mlp": (lambda x: mlp(x, norm, *weights[8:]), lambda x: mlp_reference(x, norm, *weights[8:])),
        "block": (lambda x: block(x, whole, 4), lambda x: block_reference(x, whole, 4)),
    }
    fused_one, definition = runs[function]

    def penalty(run: Callable[[Tensor], Tensor]) -> Tensor:
        (first,) = torch.autograd.grad(run(x).float().sin().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    exact, mine = penalty(definition), penalty(fused_one)
    with torch.autocast("cpu", torch.bfloat16):
        other = penalty(definition)
    assert (mine - exact).norm() <= 2 * (other - exact).norm() + 1e-2 * exact.norm()
