"""Rényi information: closed form and eigenvalues agree, and the value follows the dependence."""

import math

import pytest
import torch
from torch import Tensor

from mimir_fast import renyi_mi
from mimir_fast.ops.renyi_mi import renyi_mi_reference

ORDERS = [0.5, 1, 1.01, 2, 3, 2.5]


def samples(n: int, noise: float = 0.3, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(n)
    x = torch.rand(n, 3, 4, 4, generator=g, dtype=torch.float64)
    y = x.flatten(1)[:, :20] + noise * torch.rand(n, 20, generator=g, dtype=torch.float64)
    return x.to(device), y.to(device)


@pytest.mark.parametrize("alpha", ORDERS)
@pytest.mark.parametrize("n", [2, 50])
def test_matches_definition(n: int, alpha: float, device: torch.device) -> None:
    x, y = (t.requires_grad_() for t in samples(n, device=device))
    x32, y32 = (t.detach().float().requires_grad_() for t in (x, y))
    expected, actual = renyi_mi_reference(x, y, alpha=alpha), renyi_mi(x32, y32, alpha=alpha)
    expected.backward()
    actual.backward()
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=0)
    if n > 2:  # two samples are at the median distance, where the gradient of this bandwidth is not worth comparing
        for a, e in ((x32.grad, x.grad), (y32.grad, y.grad)):
            assert float((a - e).norm() / e.norm()) < 1e-4


def test_order_two_keeps_its_digits_with_wide_kernels() -> None:
    """Entries at 0.999: the sums of squares agree to six digits, the information is in the rest."""
    x, y = samples(60)
    expected = renyi_mi_reference(x, y, bandwidth="reference")
    actual = renyi_mi(x.float(), y.float(), bandwidth="reference")
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("alpha", ORDERS)
def test_moves_with_the_dependence(alpha: float) -> None:
    """Under the median rule: clearly larger for dependent data, growing as the noise falls, far from log2 N."""
    n = 200
    x, _ = samples(n)
    by_noise = [float(renyi_mi(x, samples(n, noise)[1], alpha=alpha)) for noise in (0.1, 1.0, 3.0)]
    shuffled = samples(n, 0.1)[1][torch.randperm(n, generator=torch.Generator().manual_seed(1))]
    independent = float(renyi_mi(x, shuffled, alpha=alpha))
    assert by_noise[0] > by_noise[1] > by_noise[2]
    assert by_noise[0] > 1.02 * independent
    assert by_noise[0] < 0.9 * math.log2(n)
    if alpha == 2:
        assert by_noise[0] > 2 * independent


def test_bad_widths_measure_nothing() -> None:
    """Why the median is the default: a narrow kernel sees log2 N bits in anything, a wide one none."""
    x, y = samples(64)
    assert float(renyi_mi(x, y, sigma=1e-3, bandwidth="reference")) == pytest.approx(6)
    assert float(renyi_mi(x, y, sigma=1e3, bandwidth="reference")) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("alpha", [1.5, 2, 3])
def test_second_order_gradient(alpha: float) -> None:
    x, y = (t.flatten(1)[:, :3].clone().requires_grad_() for t in samples(5))

    def value(x: Tensor, y: Tensor) -> Tensor:
        return renyi_mi(x, y, alpha=alpha, sigma=0.5, bandwidth="paper")

    assert torch.autograd.gradcheck(value, (x, y))
    assert torch.autograd.gradgradcheck(value, (x, y))


@pytest.mark.parametrize("alpha", [1.01, 2, 3])
def test_compiles_without_graph_break(alpha: float, device: torch.device) -> None:
    x, y = (t.float().requires_grad_() for t in samples(12, device=device))
    expected = torch.autograd.grad(renyi_mi(x, y, alpha=alpha), (x, y))
    value = torch.compile(renyi_mi, fullgraph=True, backend="aot_eager")(x, y, alpha=alpha)
    for a, e in zip(torch.autograd.grad(value, (x, y)), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6)


def test_refuses_bad_input() -> None:
    x, y = samples(4)
    with pytest.raises(ValueError, match="alpha must be > 0 and finite, got 0"):
        renyi_mi(x, y, alpha=0)
    with pytest.raises(ValueError, match="sigma must be > 0"):
        renyi_mi(x, y, sigma=0, bandwidth="paper")
    with pytest.raises(ValueError, match="samples must be finite, got NaN or Inf"):
        renyi_mi(x, y * math.nan, alpha=3)
