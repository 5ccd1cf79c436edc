"""Normalised HSIC: the authors' formula with its one-sided centring and inverses, by another road."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mimir_fast import nhsic
from mimir_fast.ops.nhsic import nhsic_reference


def samples(n: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(n)
    x = torch.rand(n, 3, 4, 4, generator=g, dtype=torch.float64)
    return x.to(device), (x.flatten(1)[:, :20] + torch.rand(n, 20, generator=g, dtype=torch.float64)).to(device)


def authors_formula(x: Tensor, y: Tensor, sigma: float = 5.0, eps: float = 1e-5) -> Tensor:
    """Σ R_x ∘ R_yᵀ with R = KH (KH + eps·N·I)⁻¹, written from the maths."""
    n = len(x)
    identity = torch.eye(n, dtype=x.dtype)
    h = identity - 1 / n

    def r(z: Tensor) -> Tensor:
        z = z.flatten(1)
        kh = torch.exp(-torch.cdist(z, z).square() / (2 * sigma**2 * z.shape[1])) @ h
        return kh @ torch.linalg.inv(kh + eps * n * identity)

    return (r(x) * r(y).T).sum()


@pytest.mark.parametrize("n", [2, 7, 64])
@pytest.mark.parametrize("sigma", [5.0, 0.5])
def test_is_the_authors_value(n: int, sigma: float) -> None:
    x, y = samples(n)
    expected = authors_formula(x, y, sigma)
    torch.testing.assert_close(nhsic_reference(x, y, sigma=sigma), expected, rtol=1e-7, atol=0)
    torch.testing.assert_close(nhsic(x, y, sigma=sigma), expected, rtol=1e-7, atol=0)
    torch.testing.assert_close(nhsic(x.float(), y.float(), sigma=sigma).double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("n", [2, 7, 300])
def test_gradient(n: int, device: torch.device) -> None:
    """Within 1e-4, or where rounding the distances to float32 costs more, no worse than the definition in float32."""
    inputs = samples(n, device)

    def gradients(function: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        x, y = (t.to(dtype).requires_grad_() for t in inputs)
        return torch.autograd.grad(function(x, y), (x, y))

    exact, single = gradients(nhsic_reference, torch.float64), gradients(nhsic_reference, torch.float32)
    for a, s, e in zip(gradients(nhsic, torch.float32), single, exact, strict=True):
        assert float((a - e).norm()) < max(1e-4 * float(e.norm()), 2 * float((s - e).norm()))


def test_range() -> None:
    x, _ = samples(40)
    # A narrow kernel and little regularisation: R is nearly H, and tr(H) = N − 1.
    assert 38.9 < float(nhsic(x, x, sigma=0.01, eps=1e-9)) <= 39
    assert abs(float(nhsic(x, torch.ones_like(x)))) < 1e-12


def test_a_failed_factorisation_is_nan() -> None:
    """eps·N below the rounding of float32 kernels: K̄ + cI is not positive definite. The value was 3.7e16 once."""
    x = torch.randn(256, 4, generator=torch.Generator().manual_seed(0))
    x = (x / 50).requires_grad_()
    value = nhsic(x, x.detach().clone(), sigma=1.0, eps=1e-12)
    assert value.isnan() and torch.autograd.grad(value, x)[0].isnan().any()
    assert nhsic(x, x.detach().clone(), sigma=1.0, eps=1e-5).isfinite()


def test_second_order_gradient() -> None:
    x, y = (t.flatten(1)[:, :3].clone().requires_grad_() for t in samples(5))
    assert torch.autograd.gradcheck(lambda x, y: nhsic(x, y, sigma=1.0, eps=0.1), (x, y))
    assert torch.autograd.gradgradcheck(lambda x, y: nhsic(x, y, sigma=1.0, eps=0.1), (x, y))


def test_registration(device: torch.device) -> None:
    k, l_ = (-torch.cdist(z.flatten(1), z.flatten(1)).requires_grad_() for z in samples(6, device))
    ops = torch.ops.mimir_fast
    torch.library.opcheck(ops.nhsic_from_kernels, (k, l_, 0.1))
    _, p_x, p_y = ops.nhsic_from_kernels(k.detach(), l_.detach(), 0.1)
    grad = torch.ones((), dtype=torch.float64, device=device)
    torch.library.opcheck(ops.nhsic_from_kernels_backward, (grad, k.detach(), l_.detach(), p_x, p_y, 0.1))


def test_compiles_without_graph_break(device: torch.device) -> None:
    x, y = (t.float().requires_grad_() for t in samples(12, device))
    expected = torch.autograd.grad(nhsic(x, y), (x, y))
    compiled = torch.compile(nhsic, fullgraph=True, backend="aot_eager")
    for a, e in zip(torch.autograd.grad(compiled(x, y), (x, y)), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6)


def test_refuses_bad_input() -> None:
    x, y = samples(4)
    with pytest.raises(ValueError, match="eps must be > 0 and finite, got 0"):
        nhsic(x, y, eps=0.0)
    with pytest.raises(ValueError, match="sigma must be > 0"):
        nhsic(x, y, sigma=-5.0)
    with pytest.raises(ValueError, match="at least 2 samples"):
        nhsic(x[:1], y[:1])
    with pytest.raises(ValueError, match="samples must be finite, got NaN or Inf"):
        nhsic(x / 0, y)


def test_forward_mode_twice() -> None:
    """Equal to forward over reverse; by torch.linalg.solve it was not."""
    x, y = (torch.rand(6, n, dtype=torch.double, generator=torch.Generator().manual_seed(n)) for n in (3, 4))

    def value(x: Tensor) -> Tensor:
        return nhsic(x, y)

    twice = torch.func.jacfwd(torch.func.jacfwd(value))(x)
    torch.testing.assert_close(twice, torch.func.jacfwd(torch.func.jacrev(value))(x), rtol=1e-5, atol=1e-7)
