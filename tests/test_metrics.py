"""CKA a batch at a time, against the formula of Nguyen et al. from Gram matrices and against CKA of everything."""

import pytest
import torch
from torch import Tensor

from mimir_fast import MinibatchCKA, cka


def representations(n: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(n)
    x = torch.randn(n, 3, 4, generator=g, dtype=torch.float64)
    return x, x.flatten(1)[:, :5].square() + torch.randn(n, 5, generator=g, dtype=torch.float64)


def hsic_1(k: Tensor, l_: Tensor) -> Tensor:
    """Nguyen et al., Eq. 3, as it stands there."""
    n, one = len(k), torch.ones(len(k), dtype=k.dtype)
    k, l_ = (m - m.diag().diag() for m in (k, l_))
    middle = (one @ k @ one) * (one @ l_ @ one) / ((n - 1) * (n - 2))
    return ((k @ l_).trace() + middle - 2 / (n - 2) * (one @ k @ l_ @ one)) / (n * (n - 3))


def test_is_the_formula_of_its_paper() -> None:
    x, y = representations(60)
    metric, sums = MinibatchCKA(), torch.zeros(3, dtype=torch.float64)
    for a, b in zip(x.split(20), y.split(20), strict=True):
        metric.update(a, b)
        k, l_ = (z.flatten(1) @ z.flatten(1).mT for z in (a, b))
        sums += torch.stack([hsic_1(k, l_), hsic_1(k, k), hsic_1(l_, l_)])
    torch.testing.assert_close(metric.compute(), sums[0] / (sums[1] * sums[2]).sqrt(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("options", [{}, {"kernel": "rbf", "sigma": (0.5, 1.0)}], ids=str)
def test_one_batch_is_unbiased_cka(options: dict[str, object]) -> None:
    metric, pair = MinibatchCKA(**options), representations(40)
    expected = cka(*pair, estimator="unbiased", **({"kernel": "linear"} | options))
    torch.testing.assert_close(metric(*pair), expected)
    metric.reset()
    torch.testing.assert_close(metric(*pair), expected)


def test_the_size_of_the_batches_does_not_shift_it() -> None:
    """Means of biased CKA over batches of 8 are 0.3 higher than the value of all."""
    x, y = representations(4000)
    whole = float(cka(x, y, kernel="linear", estimator="unbiased"))
    for size in (8, 50):
        metric = MinibatchCKA()
        for a, b in zip(x.split(size), y.split(size), strict=True):
            metric.update(a, b)
        assert abs(float(metric.compute()) - whole) < 0.03
    biased = [float(cka(a, b, kernel="linear")) for a, b in zip(x.split(8), y.split(8), strict=True)]
    assert sum(biased) / len(biased) - whole > 0.2


def test_constant_features_give_zero_and_bad_input_is_refused() -> None:
    x, y = representations(12)
    metric = MinibatchCKA()
    with pytest.raises(RuntimeError, match="no batch yet"):
        metric.compute()
    assert metric(torch.ones_like(x), y) == 0
    with pytest.raises(ValueError, match="at least 4 samples"):
        metric.update(x[:3], y[:3])
    with pytest.raises(ValueError, match="kernel must be one of"):
        MinibatchCKA(kernel="poly")
    with pytest.raises(ValueError, match="sigma must be > 0"):
        MinibatchCKA(sigma=0)
