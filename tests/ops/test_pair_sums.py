"""The pass over all pairs, and its adjoint: C++ and PyTorch tiles against the definition in float64."""

import pytest
import torch
from torch import Tensor

from mimir_fast import _native
from mimir_fast.ops.dependence import pair_sums as pair_sums_module
from mimir_fast.ops.dependence import pair_tiles
from mimir_fast.ops.dependence.bandwidth import gamma, gamma_or_later, squared_distances
from mimir_fast.ops.dependence.pair_sums import pair_sums, pair_sums_reference
from mimir_fast.ops.dependence.rbf import rbf_minus_one

# (N, D_x, D_y): one tile, its edges, several tiles with a ragged last one, more features than samples
SHAPES = [(2, 1, 1), (7, 3, 5), (64, 33, 1), (257, 20, 8), (530, 5, 60), (31, 2000, 300)]


@pytest.fixture(params=["native", "torch"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of computing a tile."""
    if request.param == "torch":
        monkeypatch.setattr(pair_tiles, "runs_cpp", lambda tile: False)
    elif not _native.has("pair_weights"):
        pytest.skip("the C++ extension is not built")
    return request.param


@pytest.fixture(params=["kept", "streamed"])
def regime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Small N keeps the kernel matrices for the backward pass, large N computes their tiles again."""
    if request.param == "streamed":
        monkeypatch.setattr(pair_tiles, "KEPT_ROWS", {"cpu": 0, "cuda": 0})
    return request.param


def samples(n: int, d_x: int, d_y: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(n + d_x)
    x = torch.rand(n, d_x, generator=g, dtype=torch.float64)
    y = torch.rand(n, d_y, generator=g, dtype=torch.float64) + x[:, :1]
    # Rounded to float32, so that all precisions see the same numbers.
    return x.float().double().to(device), y.float().double().to(device)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float(((actual.double() - expected).norm() / expected.norm()).detach())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_definition(shape: tuple[int, int, int], tiles: str, regime: str, device: torch.device) -> None:
    x, y = (t.requires_grad_() for t in samples(*shape, device))
    gammas = gamma(x, 5.0, "reference"), gamma(y, 0.7, "reference")
    expected = pair_sums_reference(x, y, *gammas)
    cotangents = [torch.randn_like(t) for t in expected]
    expected_grads = torch.autograd.grad(expected, (x, y), cotangents)

    x32, y32 = (t.detach().float().requires_grad_() for t in (x, y))
    actual = pair_sums(x32, y32, *gammas)
    grads = torch.autograd.grad(actual, (x32, y32), cotangents)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.float64
        assert relative_error(a, e) < 2e-6
    for a, e in zip(grads, expected_grads, strict=True):
        assert relative_error(a, e) < 1e-5


def test_only_the_gradient_asked_for(regime: str) -> None:
    x, y = samples(300, 4, 6)
    gammas = gamma(x, 5.0, "reference"), gamma(y, 5.0, "reference")
    both_x, both_y = x.clone().requires_grad_(), y.clone().requires_grad_()
    pair_sums(both_x, both_y, *gammas)[0].backward()
    only_y = y.clone().requires_grad_()
    pair_sums(x, only_y, *gammas)[0].backward()
    assert torch.equal(only_y.grad, both_y.grad)
    only_x = x.clone().requires_grad_()
    pair_sums(only_x, y, *gammas)[0].backward()
    assert torch.equal(only_x.grad, both_x.grad)


def test_same_input_twice(regime: str) -> None:
    """HSIC(x, x), as in CKA, computes one kernel matrix; value and gradient are those of two equal ones."""
    x, _ = samples(300, 4, 6)
    g = gamma(x, 1.0, "reference")
    once, copy_a, copy_b = (x.clone().requires_grad_() for _ in range(3))
    shared, apart = pair_sums(once, once, g, g), pair_sums(copy_a, copy_b, g, g)
    for a, b in zip(shared, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    (shared[0] + shared[1] @ shared[2]).backward()
    (apart[0] + apart[1] @ apart[2]).backward()
    torch.testing.assert_close(once.grad, copy_a.grad + copy_b.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("n", [40, 1100])
def test_same_bits_for_any_number_of_threads(n: int, tiles: str, regime: str) -> None:
    """The tiles and the sums of a tile come in a fixed order (D is small: the BLAS may split a long inner product)."""
    x, y = (t.float().requires_grad_() for t in samples(n, 16, 8))
    gammas = gamma(x, 1.0, "reference"), gamma(y, 1.0, "reference")
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            sums = pair_sums(x, y, *gammas)
            results.append((*sums, *torch.autograd.grad(sums[0] + sums[1] @ sums[2], (x, y))))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.skipif(not _native.has("kernel_from_gram"), reason="the C++ extension is not built")
def test_native_expm1_over_its_whole_range() -> None:
    d2 = torch.cat([torch.zeros(1), torch.logspace(-30, 2.5, 4000)])
    # A tile of one row whose Gram entries are 0 and whose norms are d²: what is left is expm1.
    tile, norms = torch.zeros(1, len(d2)), d2
    pair_tiles.kernel_from_gram_(tile, torch.zeros(1), norms, torch.tensor(1.0), False, None, None)
    expected = torch.expm1(-d2.double())
    assert tile[0, 0] == 0
    assert float(((tile[0].double() - expected) / expected)[1:].abs().max()) < 2.5e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_duplicates_are_at_distance_zero(dtype: torch.dtype, tiles: str) -> None:
    x = torch.rand(300, 7, dtype=dtype)
    x[200:] = x[:100]
    k = rbf_minus_one(x, gamma(x, 0.5, "reference"))
    tolerance = 10 * torch.finfo(dtype).eps
    assert not k.diagonal().any()
    assert float(k[torch.arange(200, 300), torch.arange(100)].abs().max()) < tolerance
    torch.testing.assert_close(k, k.mT, rtol=0, atol=tolerance)


def test_kernel_matrix_matches_definition(tiles: str) -> None:
    x, _ = samples(530, 9, 1)
    g = gamma(x, 1.0, "reference")
    x64, x32 = x.clone().requires_grad_(), x.float().requires_grad_()
    expected, actual = torch.expm1(-g * squared_distances(x64)), rbf_minus_one(x32, g)
    assert relative_error(actual, expected) < 1e-6
    cotangent = torch.randn_like(actual)
    (expected_grad,) = torch.autograd.grad(expected, x64, cotangent.double())
    (grad,) = torch.autograd.grad(actual, x32, cotangent)
    assert relative_error(grad, expected_grad) < 1e-5


@pytest.mark.parametrize("n", [2, 5, 64, 2100])
def test_median_of_squared_distances(n: int) -> None:
    x, _ = samples(n, 3, 1)
    expected = torch.nn.functional.pdist(x).square().median()
    actual = 1 / (2 * gamma(x, 5.0, "median"))
    # Beyond 2048 samples it is estimated from some of them.
    torch.testing.assert_close(actual, expected, rtol=1e-10 if n <= 2048 else 0.01, atol=0)


@pytest.mark.parametrize("scale", [1e-9, 1e5])
def test_the_median_rule_knows_no_unit(scale: float) -> None:
    x = torch.rand(40, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(gamma(scale * x, 5.0, "median") * scale**2, gamma(x, 5.0, "median"), rtol=1e-4, atol=0)


def test_the_median_of_equal_samples_is_what_rounding_leaves() -> None:
    d2 = 1 / (2 * gamma(torch.full((40, 30), 0.1), 5.0, "median"))
    assert 1e-14 < d2 / 0.3 < 1e-11


def test_median_of_groups_that_take_turns() -> None:
    """Every third of 6144 rows is of one group: the distances within it say nothing of the others."""
    x, _ = samples(6144, 3, 1)
    x += torch.tensor([0.0, 30.0, -30.0]).repeat(2048)[:, None]
    torch.testing.assert_close(gamma(x, 5.0, "median"), gamma(x.sort(dim=0).values, 5.0, "median"), rtol=0.02, atol=0)


def test_second_order_gradient() -> None:
    x, y = (t[:, :2].clone().requires_grad_() for t in samples(5, 3, 4))
    g = gamma(x, 0.5, "paper")
    assert torch.autograd.gradgradcheck(lambda x, y: pair_sums(x, y, g, g), (x, y))
    assert torch.autograd.gradgradcheck(lambda x: rbf_minus_one(x, g), (x,))


@pytest.mark.parametrize("shape", [(2, 1, 1), (7, 3, 5), (257, 20, 8), (31, 2000, 300)], ids=str)
def test_the_median_rule_inside_the_pass(shape: tuple[int, int, int], tiles: str, device: torch.device) -> None:
    """The Gram matrix is made once for width and kernel: value and gradients as with the width found before."""
    x, y = (t.float().requires_grad_() for t in samples(*shape, device))
    results = []
    for width in (gamma, gamma_or_later):
        gammas = width(x, 1.0, "median"), width(y, 1.0, "median")
        sums = pair_sums(x, y, *gammas)
        with torch.no_grad():
            for alone, kept in zip(pair_sums(x, y, *gammas), sums, strict=True):
                torch.testing.assert_close(alone, kept.detach())
        results.append((*sums, *torch.autograd.grad([t.sum() for t in sums], (x, y))))
    assert not gammas[0].numel()
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.detach().abs().max()))


@pytest.mark.parametrize("needs", [(True, True), (False, True)], ids=str)
@pytest.mark.parametrize("keep", [True, False])
def test_registration(keep: bool, needs: tuple[bool, bool], device: torch.device) -> None:
    x, y = (t.requires_grad_(need) for t, need in zip(samples(9, 4, 3, device), needs, strict=True))
    g = gamma(x, 1.0, "reference")
    torch.library.opcheck(torch.ops.mimir_fast.pair_sums, (x, y, g, g, keep))
    torch.library.opcheck(torch.ops.mimir_fast.pair_sums, (x, y, g.new_empty(0), g, keep))
    s, r, q, k, l_, _ = pair_sums_module._pair_sums(x.detach(), y.detach(), g, g, keep)
    grads = torch.ones_like(s), torch.ones_like(r), torch.ones_like(q)
    torch.library.opcheck(
        torch.ops.mimir_fast.pair_sums_backward, (*grads, x.detach(), y.detach(), g, g, k, l_, *needs)
    )


def test_registration_of_the_kernel_matrix(device: torch.device) -> None:
    x = samples(9, 4, 3, device)[0].requires_grad_()
    g = gamma(x, 1.0, "reference")
    torch.library.opcheck(torch.ops.mimir_fast.rbf_minus_one.default, (x, g))
    k = rbf_minus_one(x, g).detach()
    torch.library.opcheck(torch.ops.mimir_fast.rbf_minus_one_backward, (torch.ones_like(k), x.detach(), g, k))
