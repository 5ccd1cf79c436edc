"""Tokens plus positions behind a prefix: additions of two numbers, so equal bit for bit."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from mimir_fast import _native
from mimir_fast.ops.positions import add_positions, add_positions_reference, behind_prefix

SHAPES = [(3, 196, 49, 1, 96), (1, 1, 1, 0, 1), (3, 7, 5, 1, 33), (2, 6, 6, 2, 65), (0, 4, 2, 1, 3)]  # B, N, K, F, D
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def operands(shape, device="cpu", dtype=torch.float32):
    B, N, K, F, D = shape
    rng = torch.Generator().manual_seed(N)
    wide = torch.randn(B, K + 2, D, generator=rng).to(device, dtype)
    positions, prefix = (torch.randn(rows, D, generator=rng).to(device) for rows in (F + N, F))
    ids = behind_prefix(torch.rand(B, N, generator=rng).argsort(1)[:, :K].to(device), F)
    return wide[:, 2:], ids, positions, prefix  # tokens are a slice, as behind a cls token


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_definition(shape, dtype, device):
    tokens, ids, positions, prefix = operands(shape, device, dtype)
    whole = positions[: ids.shape[1]]  # as many positions as rows: no ids needed
    for places, table in ((ids, positions), (None, whole)):
        leaves = [t.detach().clone().requires_grad_() for t in (tokens, table, prefix)]
        out, wanted = (f(leaves[0], places, leaves[1], leaves[2]) for f in (add_positions, add_positions_reference))
        assert torch.equal(out, wanted) and out.dtype == dtype
        weights = torch.randn_like(out)
        ours, theirs = (torch.autograd.grad((t * weights).sum(), leaves) for t in (out, wanted))
        assert torch.equal(ours[0], theirs[0])
        for a, b in zip(ours[1:], theirs[1:], strict=True):  # sums: another order
            torch.testing.assert_close(a, b, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=2e-2)


def test_a_slice_is_read_where_it_lies_and_without_a_kernel_too(monkeypatch):
    tokens, ids, positions, prefix = operands(SHAPES[0])
    assert not tokens.is_contiguous()
    first = add_positions(tokens, ids, positions, prefix)
    assert torch.equal(first, add_positions(tokens.contiguous(), ids.t().contiguous().t(), positions, prefix))
    monkeypatch.setattr(_native, "has", lambda function: False)
    assert torch.equal(first, add_positions(tokens, ids, positions, prefix))


def test_without_a_prefix():
    tokens, ids, positions, _ = operands((2, 9, 4, 0, 5))
    assert torch.equal(add_positions(tokens, ids, positions), tokens + positions[ids])
    assert behind_prefix(ids, 0) is ids
    assert behind_prefix(torch.tensor([[4, 0], [1, 2]]), 1).tolist() == [[0, 5, 1], [0, 2, 3]]


def test_derivatives_of_second_order(device):
    tokens, ids, positions, prefix = operands((2, 5, 3, 1, 2), device, torch.float64)
    leaves = [t.double().clone().requires_grad_() for t in (tokens, positions, prefix)]
    assert gradcheck(lambda t, p, c: add_positions(t, ids, p, c).square(), leaves)
    assert gradgradcheck(lambda t, p, c: add_positions(t, ids, p, c).square(), leaves)


@pytest.mark.parametrize("shape", [*SHAPES[1:], (2, 20, 9, 1, 768)], ids=str)
def test_triton_kernel(shape, triton_device):
    from mimir_kernels import tokens as kernels

    tokens, ids, positions, prefix = operands(shape, triton_device)
    ids = ids.contiguous()
    for places, table in ((ids, positions), (None, positions[: ids.shape[1]])):
        wanted = add_positions_reference(tokens, places, table, prefix)
        out = torch.full_like(wanted, torch.nan)
        kernels.add_positions(tokens, places, table, prefix, out)
        assert torch.equal(out, wanted)


def test_triton_adds_nothing_for_a_wrong_id(triton_device):
    from mimir_kernels import tokens as kernels

    tokens, positions = torch.randn(1, 3, 8, device=triton_device), torch.ones(2, 8, device=triton_device)
    out = torch.full_like(tokens, torch.nan)
    kernels.add_positions(tokens, torch.tensor([[1, -1, 2**40]], device=triton_device), positions, tokens[0, :0], out)
    assert torch.equal(out, tokens + torch.tensor([1.0, 0, 0], device=triton_device)[:, None])


def test_registration(device):
    tokens, ids, positions, prefix = operands((2, 6, 3, 1, 4), device)
    leaves = [t.clone().requires_grad_() for t in (tokens, positions, prefix)]
    torch.library.opcheck(torch.ops.mimir_fast.add_positions, (leaves[0], ids, *leaves[1:]))
    torch.library.opcheck(torch.ops.mimir_fast.add_positions, (leaves[0], None, leaves[1][:4], leaves[2]))


def test_compiles_without_graph_break(device):
    tokens, ids, positions, prefix = operands((2, 6, 3, 1, 4), device)
    leaves = [t.clone().requires_grad_() for t in (tokens, positions, prefix)]

    def total(tokens, positions, prefix):
        return add_positions(tokens, ids, positions, prefix).square().sum()

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    actual, expected = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, total))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


X, IDS = torch.zeros(2, 3, 8), torch.tensor([[0, 1, 2, 3], [0, 4, 3, 2]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions_RD": torch.zeros(5, 7)}, r"positions must be \(R, 8\)"),
        ({"prefix_FD": torch.zeros(1, 1, 8)}, r"prefix \(F, 8\)"),
        ({"prefix_FD": None}, "ids of an image must be 0 \\+ 3, for prefix and tokens, got 4"),
        ({"ids_BT": None}, "rows of positions must be 1 \\+ 3, for prefix and tokens, got 5"),
        ({"ids_BT": IDS + 1}, r"ids must lie in \[0, 5\)"),
        ({"positions_RD": torch.zeros(5, 8, device="meta")}, "one device"),
    ],
)
def test_refuses(change, message):
    arguments = {"tokens_BKD": X, "ids_BT": IDS, "positions_RD": torch.zeros(5, 8), "prefix_FD": torch.zeros(1, 8)}
    with pytest.raises(ValueError, match=message):
        add_positions(**arguments | change)
