"""Attention in C++: the definition's values and derivatives, on any layout, any number of threads, each unit."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from exact_attention import exact_attention
from rounding import FLOAT32, assert_as_accurate
from torch import Tensor

from mimir_fast import _native
from mimir_fast.layers import native_attention as op
from mimir_fast.layers.attention import attention
from mimir_fast.layers.native_attention import (
    native_attention,
    native_attention_reference,
    native_self_attention,
    takes,
)

CPU = torch.device("cpu")
UNIT = _native.run("bf16_unit") if _native.has("bf16_unit") else ""
UNITS = {"amx": ["amx", "avx512"], "avx512": ["avx512"], "": []}[UNIT]
LANES = [n for n in (16, 8, 4) if _native.has("fp32_lanes") and n <= _native.run("fp32_lanes")]
SHAPES = [(1, 1, 1, 1), (2, 5, 16, 3), (2, 17, 15, 2), (3, 147, 197, 4), (1, 300, 33, 1), (1, 33, 300, 1)]

pytestmark = pytest.mark.skipif(not _native.has("fp32_attention"), reason="the C++ extension was not built")


@pytest.fixture(params=[*LANES, *UNITS])
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.dtype]:
    """float32 in vectors of every width, and bfloat16 on every unit, that this processor has."""
    if isinstance(request.param, int):
        monkeypatch.setattr(op, "_FP32_LANES", request.param)
        yield torch.float32
    else:
        monkeypatch.setattr(op, "_BF16_UNIT", request.param)
        yield torch.bfloat16


def random_qkv(B: int, T: int, S: int, H: int, dtype: torch.dtype = torch.float32, E: int = 8) -> list[Tensor]:
    rng = torch.Generator().manual_seed(T)
    return [torch.randn(B, n, H, E, generator=rng).to(dtype).requires_grad_() for n in (T, S, S)]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


@pytest.mark.parametrize("E", [8, 16, 24, 64, 128])
@pytest.mark.parametrize(("B", "T", "S", "H"), SHAPES)
def test_equals_the_definition(B: int, T: int, S: int, H: int, E: int, dtype: torch.dtype) -> None:
    qkv = random_qkv(B, T, S, H, dtype, E)
    grad = torch.randn(B, T, H, E).to(dtype)

    def results(function: Callable[..., Tensor]) -> list[Tensor]:
        out = function(*qkv)
        return [out, *torch.autograd.grad(out, qkv, grad)]

    out = native_attention_reference(*(t.detach().double() for t in qkv))
    ours, theirs = results(native_attention), results(sdpa)
    assert_as_accurate(ours, theirs, exact_attention, [*qkv, out, grad], FLOAT32)


def test_peaked_scores_neither_overflow_nor_lose_the_winner(dtype: torch.dtype) -> None:
    q, k, v = (t.detach() for t in random_qkv(2, 9, 33, 2, dtype))
    out = native_attention(64 * q, 64 * k, v)  # powers of two: exact in bf16
    wanted = native_attention_reference(64 * q.double(), 64 * k.double(), v.double())
    torch.testing.assert_close(out.double(), wanted, rtol=1e-2, atol=1e-3)  # scores of 1e5 in fp32
    for index in range(3):
        poisoned = [q, k, v]
        poisoned[index] = poisoned[index] * torch.nan
        assert native_attention(*poisoned).isnan().all()


def test_slices_of_a_fused_projection_are_read_where_they_lie(dtype: torch.dtype) -> None:
    fused = torch.randn(2, 13, 3, 4, 8).to(dtype)
    q, k, v = fused.unbind(2)
    assert not q.is_contiguous()
    assert torch.equal(native_attention(q, k, v), native_attention(*(t.contiguous() for t in (q, k, v))))
    swapped = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]  # heads apart: copied first
    assert torch.equal(native_attention(*swapped), native_attention(q, k, v))


def test_a_fused_projection_gets_its_gradient_in_one_piece(dtype: torch.dtype) -> None:
    fused = torch.randn(2, 37, 3, 4, 8).to(dtype).requires_grad_()
    apart = [t.detach().requires_grad_() for t in fused.unbind(2)]
    out, wanted = native_self_attention(fused), native_attention(*apart)
    grad = torch.randn(out.shape).to(dtype)
    (mine,) = torch.autograd.grad(out, fused, grad)
    assert torch.equal(out, wanted)
    assert torch.equal(mine, torch.stack(torch.autograd.grad(wanted, apart, grad), dim=2))
    torch.library.opcheck(torch.ops.mimir_fast.native_self_attention.default, (fused,))


def test_neighbours_in_memory_do_not_leak_in(dtype: torch.dtype) -> None:
    """Padding to whole tiles reads nothing beyond the tokens, and writes nothing there."""
    q, k, v = (t.detach() for t in random_qkv(1, 18, 19, 1, dtype))
    fenced = [torch.full((3, *t.shape[1:]), torch.nan, dtype=dtype) for t in (q, k, v)]
    for fence, t in zip(fenced, (q, k, v), strict=True):
        fence[1] = t[0]
    inside = [fence[1:2] for fence in fenced]
    assert torch.equal(native_attention(*inside), native_attention(q, k, v))


def test_bits_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    qkv = random_qkv(2, 40, 40, 5, dtype)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        out = native_attention(*qkv)
        results.append([out, *torch.autograd.grad(out.square().sum(), qkv)])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_products_of_pytorch_and_ours_take_turns_on_the_tiles() -> None:
    """Both configure the processor's tile registers; neither may find the other's configuration in its way."""
    if UNIT != "amx":
        pytest.skip("no AMX here")
    a = torch.randn(512, 512).bfloat16()
    qkv = random_qkv(2, 50, 50, 3, torch.bfloat16, 64)
    product, out = a @ a, native_attention(*qkv)
    for _ in range(3):
        assert torch.equal(a @ a, product)
        assert torch.equal(native_attention(*qkv), out)


def test_attention_offers_it_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (t.detach() for t in random_qkv(1, 4, 4, 2))
    monkeypatch.setenv("MIMIR_FAST_ATTENTION", "native")
    assert takes(CPU, torch.float32, 8)
    assert torch.equal(attention(q, k, v), native_attention(q, k, v))
    assert not takes(CPU, torch.float64, 8) and not takes(CPU, torch.float32, 12)
    assert takes(CPU, torch.bfloat16, 64) == bool(UNIT)
    assert not takes(CPU, torch.bfloat16, 12) and not takes(CPU, torch.bfloat16, 136)
    wide = torch.randn(1, 4, 2, 12)
    torch.testing.assert_close(attention(wide, wide, wide), native_attention_reference(wide, wide, wide))


def test_second_order() -> None:
    qkv = random_qkv(1, 3, 4, 1)
    exact = [t.detach().double().requires_grad_() for t in qkv]
    seconds = []
    fused = torch.stack([t.detach() for t in qkv[:1] * 3], dim=2).requires_grad_()
    first = torch.autograd.grad(native_self_attention(fused).sin().sum(), fused, create_graph=True)[0]
    (ours,) = torch.autograd.grad(first.square().sum(), fused)
    same = fused.detach().double().requires_grad_()
    first = torch.autograd.grad(native_attention_reference(*same.unbind(2)).sin().sum(), same, create_graph=True)[0]
    torch.testing.assert_close(
        ours.double(), torch.autograd.grad(first.square().sum(), same)[0], rtol=1e-4, atol=1e-5
    )  # fmt: skip
    for function, inputs in ((native_attention, qkv), (native_attention_reference, exact)):
        firsts = torch.autograd.grad(function(*inputs).sin().sum(), inputs, create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in firsts), inputs))
    for ours, theirs in zip(*seconds, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


def test_op_contract_and_fullgraph(dtype: torch.dtype) -> None:
    qkv = random_qkv(2, 5, 6, 2, dtype)
    torch.library.opcheck(torch.ops.mimir_fast.native_attention.default, tuple(qkv))
    # Graphs break before a backend sees them. This one op goes through Inductor, which takes ten seconds to start.
    backend = "inductor" if dtype == torch.float32 else "aot_eager"
    compiled = torch.compile(native_attention, fullgraph=True, backend=backend)
    grad = torch.randn(2, 5, 2, 8).to(dtype)
    compiled_out, out = compiled(*qkv), native_attention(*qkv)
    for mine, eager in zip(
        (compiled_out, *torch.autograd.grad(compiled_out, qkv, grad)),
        (out, *torch.autograd.grad(out, qkv, grad)),
        strict=True,
    ):
        torch.testing.assert_close(mine, eager)
