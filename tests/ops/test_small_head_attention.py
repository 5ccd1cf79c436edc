"""Attention for heads of 8: the definition's values and derivatives, on any layout, with any number of threads."""

import pytest
import torch
from torch import Tensor

from mimir_fast import _native
from mimir_fast.models.attention import attention
from mimir_fast.ops.small_head_attention import (
    small_head_attention,
    small_head_attention_reference,
    takes,
)

pytestmark = pytest.mark.skipif(not _native.has("small_head_attention"), reason="the C++ extension was not built")


def random_qkv(B: int, T: int, S: int, H: int) -> list[Tensor]:
    rng = torch.Generator().manual_seed(T)
    return [torch.randn(B, n, H, 8, generator=rng).requires_grad_() for n in (T, S, S)]


@pytest.mark.parametrize(("B", "T", "S", "H"), [(1, 1, 1, 1), (2, 5, 16, 3), (2, 17, 15, 2), (3, 147, 197, 4)])
def test_equals_the_definition(B: int, T: int, S: int, H: int) -> None:
    qkv = random_qkv(B, T, S, H)
    exact = [t.detach().double().requires_grad_() for t in qkv]
    out, wanted = small_head_attention(*qkv), small_head_attention_reference(*exact)
    grad = torch.randn(out.shape)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(
        torch.autograd.grad(out, qkv, grad), torch.autograd.grad(wanted, exact, grad.double()), strict=True
    ):
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm() + 1e-7


def test_peaked_scores_neither_overflow_nor_lose_the_winner() -> None:
    q, k, v = (t.detach() for t in random_qkv(2, 9, 33, 2))
    out = small_head_attention(100 * q, 100 * k, v)
    wanted = small_head_attention_reference(100 * q.double(), 100 * k.double(), v.double())
    torch.testing.assert_close(out.double(), wanted, rtol=1e-3, atol=1e-3)  # scores of 1e5 in fp32
    assert small_head_attention(q, k, v * torch.nan).isnan().all()


def test_slices_of_a_fused_projection_are_read_where_they_lie() -> None:
    fused = torch.randn(2, 13, 3, 4, 8)
    q, k, v = fused.unbind(2)
    assert not q.is_contiguous()
    assert torch.equal(small_head_attention(q, k, v), small_head_attention(*(t.contiguous() for t in (q, k, v))))
    swapped = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]  # heads apart: copied first
    assert torch.equal(small_head_attention(*swapped), small_head_attention(q, k, v))


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    qkv = random_qkv(2, 40, 40, 5)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        out = small_head_attention(*qkv)
        results.append([out, *torch.autograd.grad(out.square().sum(), qkv)])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_attention_offers_it_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    q, k, v = (t.detach() for t in random_qkv(1, 4, 4, 2))
    monkeypatch.setenv("MIMIR_FAST_ATTENTION", "native")
    assert takes(cpu, torch.float32, 8)
    assert torch.equal(attention(q, k, v), small_head_attention(q, k, v))
    assert not takes(cpu, torch.float64, 8) and not takes(cpu, torch.float32, 16)
    wide = torch.randn(1, 4, 2, 16)
    torch.testing.assert_close(attention(wide, wide, wide), small_head_attention_reference(wide, wide, wide))


def test_second_order() -> None:
    qkv = random_qkv(1, 3, 4, 1)
    exact = [t.detach().double().requires_grad_() for t in qkv]
    seconds = []
    for op, inputs in ((small_head_attention, qkv), (small_head_attention_reference, exact)):
        firsts = torch.autograd.grad(op(*inputs).sin().sum(), inputs, create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in firsts), inputs))
    for ours, theirs in zip(*seconds, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


def test_op_contract_and_fullgraph() -> None:
    qkv = random_qkv(2, 5, 6, 2)
    torch.library.opcheck(torch.ops.mimir_fast.small_head_attention.default, tuple(qkv))
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*qkv), attention(*qkv))
