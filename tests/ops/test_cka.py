"""CKA: what it is invariant to, and both kernels against formulas written from N×N matrices."""

import pytest
import torch
from torch import Tensor

from mimir_fast import cka, hsic


def samples(n: int = 40) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(n)
    x = torch.randn(n, 3, 5, generator=g, dtype=torch.float64)
    return x, x.flatten(1)[:, :6] + torch.randn(n, 6, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("bandwidth", ["reference", "paper", "median"])
def test_rbf_is_a_ratio_of_hsics(estimator: str, bandwidth: str) -> None:
    x, y = samples()
    options = {"estimator": estimator, "bandwidth": bandwidth}
    expected = hsic(x, y, **options) / (hsic(x, x, **options) * hsic(y, y, **options)).sqrt()
    torch.testing.assert_close(cka(x, y, **options), expected, rtol=1e-10, atol=0)


def test_the_default_width_is_nearly_linear() -> None:
    """As its docstring says; others' packages take the median."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(256, 64, generator=g)
    y = x[:, :16].square() + torch.randn(256, 16, generator=g)
    assert abs(float(cka(x, y) - cka(x, y, kernel="linear"))) < 0.02
    assert abs(float(cka(x, y, bandwidth="median") - cka(x, y, kernel="linear"))) > 0.05


def kornblith(x: Tensor, y: Tensor) -> tuple[float, float]:
    """CKA as Kornblith et al.'s colab has it, with its median over all N² distances; and the ratio of the medians."""
    grams, medians = [], []
    for z in (x.flatten(1), y.flatten(1)):
        d2 = torch.cdist(z, z).square().fill_diagonal_(0)
        medians.append(torch.quantile(d2, 0.5))
        h = torch.eye(len(z), dtype=z.dtype) - 1 / len(z)
        grams.append(h @ torch.exp(-d2 / (2 * medians[-1])) @ h)
    others = [d2[d2 > 0] for d2 in [torch.cdist(x.flatten(1), x.flatten(1)).square()]]
    return float((grams[0] * grams[1]).sum() / (grams[0].norm() * grams[1].norm())), float(
        medians[0] / others[0].median()
    )


def test_others_count_the_diagonal_in_their_median() -> None:
    """What the docstring says of their width, and that nothing else differs."""
    for n, narrower, near in ((8, (0.97, 0.99), 0.01), (512, (0.998, 0.9995), 1e-4)):
        theirs, ratio = kornblith(*samples(n))
        assert narrower[0] < ratio <= narrower[1]
        assert abs(float(cka(*samples(n), bandwidth="median")) - theirs) < near


@pytest.mark.parametrize("n", [5, 40])  # fewer samples than features, and more
def test_linear_is_the_gram_formula(n: int) -> None:
    x, y = samples(n)
    h = torch.eye(n, dtype=x.dtype) - 1 / n
    k, l_ = (h @ (z.flatten(1) @ z.flatten(1).T) @ h for z in (x, y))
    expected = (k * l_).sum() / (k.norm() * l_.norm())
    torch.testing.assert_close(cka(x, y, kernel="linear"), expected, rtol=1e-10, atol=0)


def test_unbiased_linear_is_fair_when_features_outnumber_samples() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 1000, generator=g), torch.randn(20, 1000, generator=g)
    assert float(cka(x, y, kernel="linear")) > 0.9  # independent, and yet
    assert abs(float(cka(x, y, kernel="linear", estimator="unbiased"))) < 0.2


@pytest.mark.parametrize("options", [{"kernel": "linear"}, {"bandwidth": "median"}], ids=str)
def test_rotation_and_scale_change_nothing(options: dict[str, str]) -> None:
    x, y = samples()
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=x.dtype)).Q
    torch.testing.assert_close(cka(x, 7 * y @ rotation + 3, **options), cka(x, y, **options), rtol=1e-8, atol=0)
    torch.testing.assert_close(cka(y, 7 * y @ rotation, **options), torch.ones((), dtype=x.dtype))


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("options", [{"kernel": "linear"}, {}, {"bandwidth": "median"}], ids=str)
def test_constant_features_give_zero(options: dict[str, str], estimator: str) -> None:
    x, y = (z.requires_grad_() for z in samples())
    constant = torch.ones_like(x, requires_grad=True)
    for pair in ((constant, y), (x, constant), (constant, constant)):
        value = cka(*pair, **options, estimator=estimator)
        assert value == 0
        assert all(not gradient.any() for gradient in torch.autograd.grad(value, pair))


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("options", [{"kernel": "linear"}, {}, {"bandwidth": "median"}], ids=str)
@pytest.mark.parametrize("value", [0.1, 1e4 / 3, 1e-6 / 3])
def test_a_constant_that_is_rounded_gives_zero(value: float, options: dict[str, str], estimator: str) -> None:
    """Its mean is not it, and what is left of the samples would be a pattern of rounding."""
    _, y = samples(37)
    constant = torch.full((37, 50), value)
    assert cka(constant, y.float(), **options, estimator=estimator) == 0
    seen = constant * (1 + 1e-4 * y[:, :1].float())
    assert cka(seen, y.float(), **options) > 0.05


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_what_is_not_finite_is_refused(kernel: str, value: float) -> None:
    x, y = samples()
    y[3, 2] = value
    with pytest.raises(ValueError, match="y must be finite"):
        cka(x, y, kernel=kernel)


def test_linear_products_are_exact_though_others_may_not_be(monkeypatch: pytest.MonkeyPatch) -> None:
    from mimir_fast.ops import cka as module

    seen, sums = [], module.linear_sums

    def asking(*given: Tensor, **how: bool) -> tuple[Tensor, Tensor, Tensor]:
        seen.append(torch.backends.mkldnn.matmul.fp32_precision)
        return sums(*given, **how)

    monkeypatch.setattr(module, "linear_sums", asking)
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        cka(*samples(), kernel="linear")
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    assert seen == ["ieee"] * 3


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_gradients(kernel: str, estimator: str) -> None:
    x, y = (t.flatten(1)[:, :3].clone().requires_grad_() for t in samples(6))

    def value(x: Tensor, y: Tensor) -> Tensor:
        return cka(x, y, kernel=kernel, estimator=estimator, sigma=(1.0, 5.0))

    assert torch.autograd.gradcheck(value, (x, y))
    assert torch.autograd.gradgradcheck(value, (x, y))


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_compiles_without_graph_break(kernel: str, device: torch.device) -> None:
    x, y = (t.float().to(device).requires_grad_() for t in samples())
    expected = torch.autograd.grad(cka(x, y, kernel=kernel), (x, y))
    value = torch.compile(cka, fullgraph=True, backend="aot_eager")(x, y, kernel=kernel)
    for a, e in zip(torch.autograd.grad(value, (x, y)), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6)


def test_refuses_bad_input() -> None:
    x, y = samples()
    with pytest.raises(ValueError, match="kernel must be one of 'rbf', 'linear', got 'cosine'"):
        cka(x, y, kernel="cosine")
    with pytest.raises(ValueError, match="at least 4 samples"):
        cka(x[:3], y[:3], estimator="unbiased")
