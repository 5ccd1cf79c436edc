"""Gather of token rows, its adjoint, and the scatter among mask tokens: copies, so equal bit for bit."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from mimir_fast import _native
from mimir_fast.ops.tokens import gather_patches, gather_patches_reference, scatter_patches, scatter_patches_reference

SHAPES = [(3, 196, 49, 96), (1, 1, 1, 1), (3, 7, 5, 33), (2, 64, 64, 65), (2, 9, 0, 16), (0, 4, 2, 3)]  # B, N, K, D
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def ids_of(B: int, N: int, K: int, device: torch.device | str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(N)
    return torch.rand(B, N, generator=generator).argsort(1)[:, :K].to(device)


def scatter_operands(shape: tuple[int, ...], device: torch.device | str, dtype: torch.dtype = torch.float32):
    B, N, K, D = shape
    tensors = (torch.randn(size, dtype=dtype).to(device) for size in ((B, K, D), (D,), (N, D)))
    visible, mask_token, pos_embed = tensors
    return visible, ids_of(B, N, K, device), mask_token, pos_embed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gather_matches_definition(shape, dtype, device):
    B, N, K, D = shape
    x, ids = torch.randn(B, N, D, device=device).to(dtype).requires_grad_(), ids_of(B, N, K, device)
    y, expected = gather_patches(x, ids), gather_patches_reference(x, ids)
    assert torch.equal(y, expected)
    weights = torch.randn_like(y)
    gradients = [torch.autograd.grad((out * weights).sum(), x)[0] for out in (y, expected)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scatter_matches_definition(shape, dtype, device):
    visible, ids, mask_token, pos_embed = scatter_operands(shape, device, dtype)
    leaves = [tensor.requires_grad_() for tensor in (visible, mask_token, pos_embed)]
    z, expected = (f(visible, ids, mask_token, pos_embed) for f in (scatter_patches, scatter_patches_reference))
    assert torch.equal(z, expected)
    weights = torch.randn_like(z)
    actual, wanted = (torch.autograd.grad((out * weights).sum(), leaves) for out in (z, expected))
    assert torch.equal(actual[0], wanted[0])
    for a, b in zip(actual[1:], wanted[1:], strict=True):  # sums: another order
        torch.testing.assert_close(
            a, b, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=0.1 if dtype == torch.bfloat16 else 1e-5
        )


def test_layouts(device):
    """A slice without the class token, a transposed tensor, a broadcast one: read where they lie or copied."""
    ids = ids_of(3, 8, 5, device)
    wide = torch.randn(3, 9, 12, device=device)
    for x in (wide[:, 1:], wide[:, :8].transpose(1, 2).contiguous().transpose(1, 2), wide[:1, :8].expand(3, -1, -1)):
        assert torch.equal(gather_patches(x, ids), gather_patches_reference(x, ids))
    visible, _, mask_token, pos_embed = scatter_operands((3, 8, 5, 12), device)
    for v in (wide[:, 1:6], visible.transpose(0, 2).contiguous().transpose(0, 2)):
        arguments = (v, ids.t().contiguous().t(), mask_token, pos_embed)
        assert torch.equal(scatter_patches(*arguments), scatter_patches_reference(*arguments))


def test_mask_token_and_positions_take_the_dtype_of_the_tokens(device):
    visible, ids, mask_token, pos_embed = scatter_operands((2, 6, 3, 8), device)
    z = scatter_patches(visible.bfloat16(), ids, mask_token, pos_embed)
    assert z.dtype == torch.bfloat16
    assert torch.equal(z, scatter_patches_reference(visible.bfloat16(), ids, mask_token, pos_embed))


def test_derivatives_of_second_order(device):
    ids = ids_of(2, 5, 3, device)
    x = torch.randn(2, 5, 2, dtype=torch.float64, device=device, requires_grad=True)
    assert gradcheck(lambda x: gather_patches(x, ids).square(), x)
    assert gradgradcheck(lambda x: gather_patches(x, ids).square(), x)
    visible, _, *rest = scatter_operands((2, 5, 3, 2), device, torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (visible, *rest)]
    assert gradcheck(lambda v, m, p: scatter_patches(v, ids, m, p).square(), leaves)
    assert gradgradcheck(lambda v, m, p: scatter_patches(v, ids, m, p).square(), leaves)


def test_same_without_the_native_kernel(monkeypatch):
    visible, ids, mask_token, pos_embed = scatter_operands((2, 9, 4, 5), "cpu")
    x = torch.randn(2, 9, 5, requires_grad=True)
    results = []
    for has in (_native.has, lambda function: False):
        monkeypatch.setattr(_native, "has", has)
        y = gather_patches(x, ids)
        z = scatter_patches(visible, ids, mask_token, pos_embed)
        results.append((y, z, *torch.autograd.grad(y.square().sum(), x)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("shape", [*SHAPES[1:], (2, 20, 9, 768), (2, 5, 3, 1030)], ids=str)
def test_triton_kernels(shape, triton_device):
    from mimir_kernels import tokens as kernels

    B, N, K, D = shape
    visible, ids, mask_token, pos_embed = scatter_operands(shape, triton_device)
    x, ids = torch.randn(B, N + 1, D, device=triton_device)[:, 1:], ids.contiguous()
    y, z, placed = (torch.full((B, rows, D), torch.nan, device=triton_device) for rows in (K, N, N))
    kernels.gather_patches(x, ids, y)
    assert torch.equal(y, gather_patches_reference(x, ids))
    kernels.scatter_patches(visible, kernels.inverse(ids, N), mask_token, pos_embed, z)
    assert torch.equal(z, scatter_patches_reference(visible, ids, mask_token, pos_embed))
    kernels.place_patches(visible, kernels.inverse(ids, N), placed)
    assert torch.equal(placed, torch.zeros_like(z).scatter(1, ids.unsqueeze(-1).expand(-1, -1, D), visible))


def test_triton_reads_and_writes_nothing_for_a_wrong_id(triton_device):
    """On a GPU ids are not looked at; a wrong one gives zeros, and nobody's memory is touched."""
    from mimir_kernels import tokens as kernels

    ids = torch.tensor([[1, -1, 3], [2**40, 0, 2]], device=triton_device)
    x = torch.randn(2, 3, 8, device=triton_device)
    y = torch.full((2, 3, 8), torch.nan, device=triton_device)
    kernels.gather_patches(x, ids, y)
    zeros = torch.zeros(8, device=triton_device)
    for row, wanted in ((y[0], (x[0, 1], zeros, zeros)), (y[1], (zeros, x[1, 0], x[1, 2]))):
        assert torch.equal(row, torch.stack(wanted))
    assert kernels.inverse(ids, 3).tolist() == [[-1, 0, -1], [1, -1, 2]]


@pytest.mark.cuda
def test_wrong_ids_on_cuda_do_not_stop_the_device():
    ids = torch.tensor([[0, 99]], device="cuda")
    x = torch.randn(1, 4, 16, device="cuda", requires_grad=True)
    y = gather_patches(x, ids)
    assert not y[0, 1].any()
    token, positions = torch.randn(16, device="cuda", requires_grad=True), torch.zeros(4, 16, device="cuda")
    z = scatter_patches(y, ids, token, positions)
    assert torch.equal(z[0, 1:], token.expand(3, -1))
    grad_x, grad_token = torch.autograd.grad(z.sum(), (x, token))
    torch.cuda.synchronize()
    assert torch.equal(grad_x[0, 0], torch.ones(16, device="cuda")) and not grad_x[0, 1:].any()
    assert torch.equal(grad_token, torch.full((16,), 3.0, device="cuda"))


def test_registration(device):
    visible, ids, mask_token, pos_embed = scatter_operands((2, 6, 3, 4), device)
    leaves = [tensor.requires_grad_() for tensor in (visible, mask_token, pos_embed)]
    x = torch.randn(2, 6, 4, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.mimir_fast.gather_patches, (x, ids))
    torch.library.opcheck(torch.ops.mimir_fast.place_patches, (leaves[0], ids, 6))
    torch.library.opcheck(torch.ops.mimir_fast.scatter_patches, (leaves[0], ids, *leaves[1:]))


def test_compiles_without_graph_break(device):
    visible, ids, mask_token, pos_embed = scatter_operands((2, 6, 3, 4), device)
    leaves = [tensor.requires_grad_() for tensor in (visible, mask_token, pos_embed)]

    def there_and_back(visible, mask_token, pos_embed):
        return gather_patches(scatter_patches(visible, ids, mask_token, pos_embed), ids).square().sum()

    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    actual, expected = (torch.autograd.grad(f(*leaves), leaves) for f in (compiled, there_and_back))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


X, IDS = torch.zeros(2, 4, 3), torch.tensor([[0, 1], [2, 3]])


@pytest.mark.parametrize(
    ("x", "ids", "error", "message"),
    [
        (X, IDS + 1, ValueError, r"ids must lie in \[0, 4\), got ids from 1 to 4"),
        (X, IDS - 1, ValueError, "got ids from -1 to 2"),
        (X, IDS * 0, ValueError, "got a patch twice"),
        (X, IDS[:1], ValueError, r"\(B, K\) with B = 2, got \(1, 2\)"),
        (X, IDS.int(), TypeError, r"ids must be int64, got torch.int32: use ids.long\(\)"),
        (X, IDS.to("meta"), ValueError, r"use ids.to\('cpu'\)"),
        (X[0], IDS, ValueError, r"\(B, N, D\)"),
    ],
)
def test_gather_refuses(x, ids, error, message, monkeypatch):
    for has in (_native.has, lambda function: False):
        monkeypatch.setattr(_native, "has", has)
        with pytest.raises(error, match=message):
            gather_patches(x, ids)


@pytest.mark.cuda
def test_ids_on_the_gpu_are_checked_in_debug_mode(monkeypatch):
    monkeypatch.setenv("MIMIR_FAST_DEBUG", "1")
    with pytest.raises(ValueError, match="twice"):
        gather_patches(X.cuda(), IDS.cuda() * 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_token_D": torch.zeros(1, 1, 3)}, r"mask_token must be \(3,\)"),
        ({"pos_embed_ND": torch.zeros(4, 2)}, r"pos_embed \(N, 3\), got .* \(4, 2\)"),
        ({"visible_BKD": torch.zeros(2, 3, 3)}, "ids_keep"),
        ({"pos_embed_ND": torch.zeros(3, 3)}, r"ids_keep must lie in \[0, 3\)"),
        ({"mask_token_D": torch.zeros(3, device="meta")}, "one device"),
    ],
)
def test_scatter_refuses(change, message):
    arguments = {"visible_BKD": X[:, :2], "ids_keep_BK": IDS, "mask_token_D": X[0, 0], "pos_embed_ND": X[0]} | change
    with pytest.raises(ValueError, match=message):
        scatter_patches(**arguments)
