"""HSIC: against the trace formula and Song's U-statistic, in every precision, and what it refuses."""

import math
import threading
from itertools import permutations
from pathlib import Path

import pytest
import torch
from commands import run_code
from torch import Tensor, nn

from mimir_fast import hsic
from mimir_fast.ops._precision import full_precision
from mimir_fast.ops.dependence.bandwidth import gamma
from mimir_fast.ops.hsic import hsic_reference

OPTIONS = [
    {},
    {"sigma": (0.5, 2.0)},
    {"bandwidth": "paper"},
    {"bandwidth": "median"},
    {"estimator": "unbiased"},
    {"estimator": "unbiased", "bandwidth": "median"},
    {"normalizer": "(n-1)^2"},
]


def dependent(n: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(n)
    x = torch.rand(n, 3, 4, 4, generator=g)
    y = x.flatten(1)[:, :20].square() + 0.3 * torch.rand(n, 20, generator=g)
    return x.to(device, dtype), y.to(device, dtype)


def kernel(x: Tensor, sigma: float) -> Tensor:
    return torch.exp(-torch.cdist(x.flatten(1), x.flatten(1)).square() / (2 * sigma**2 * x[0].numel()))


def test_definition_is_the_trace_formula() -> None:
    x, y = dependent(12)
    k, l_ = kernel(x, 5.0), kernel(y, 5.0)
    h = torch.eye(12) - torch.ones(12, 12, dtype=torch.float64) / 12
    trace = torch.trace(k @ h @ l_ @ h)
    torch.testing.assert_close(hsic(x, y), trace / 12**2, rtol=1e-9, atol=0)
    torch.testing.assert_close(hsic(x, y, normalizer="(n-1)^2"), trace / 11**2, rtol=1e-9, atol=0)


def test_unbiased_is_the_u_statistic() -> None:
    """The mean of k_ij (l_ij + l_uv − 2 l_iu) over all quadruples of different samples (Song et al. 2012)."""
    x, y = dependent(6)
    k, l_ = kernel(x, 5.0), kernel(y, 5.0)
    terms = [k[i, j] * (l_[i, j] + l_[u, v] - 2 * l_[i, u]) for i, j, u, v in permutations(range(6), 4)]
    torch.testing.assert_close(hsic(x, y, estimator="unbiased"), torch.stack(terms).mean(), rtol=1e-8, atol=0)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("n", [4, 50, 300])
def test_matches_definition(n: int, options: dict[str, str], device: torch.device) -> None:
    x, y = (t.requires_grad_() for t in dependent(n, device))
    x32, y32 = (t.detach().float().requires_grad_() for t in (x, y))
    # The median is of the same numbers in both, up to rounding: a different pair may be in the middle.
    expected, actual = hsic_reference(x, y, **options), hsic(x32, y32, **options)
    expected.backward()
    actual.backward()
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=5e-6, atol=0)
    for a, e in ((x32.grad, x.grad), (y32.grad, y.grad)):
        assert float((a - e).norm() / e.norm()) < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_accurate_on_images(estimator: str, dtype: torch.dtype, device: torch.device) -> None:
    """d = 150,528, off-diagonal kernel about 0.9996: the numbers that `exp` and uncentred distances get wrong."""
    g = torch.Generator().manual_seed(0)
    coarse = torch.rand(24, 3, 14, 14, generator=g)
    images = nn.functional.interpolate(coarse, size=224, mode="bilinear").to(device, dtype)
    latents = torch.tanh(coarse.flatten(1) @ torch.randn(588, 3840, generator=g) / 24).to(device, dtype)
    x, y = (t.double().requires_grad_() for t in (images, latents))
    expected = hsic_reference(x, y, estimator=estimator)
    expected.backward()
    assert abs(hsic(images, latents, estimator=estimator).item() / expected.item() - 1) < 1e-5
    # float32 leaves, so that a gradient rounded to bfloat16 does not hide its error
    x32, y32 = (t.detach().float().requires_grad_() for t in (images, latents))
    hsic(x32, y32, estimator=estimator).backward()
    for a, e in ((x32.grad, x.grad), (y32.grad, y.grad)):
        assert float((a - e).norm() / e.norm()) < 1e-4


def test_zero_for_independent_samples_only() -> None:
    g = torch.Generator().manual_seed(0)
    x, noise = torch.randn(400, 1, generator=g), torch.randn(400, 1, generator=g)
    options = {"bandwidth": "median", "estimator": "unbiased"}
    assert abs(float(hsic(x, noise, **options))) < 2e-3
    # dependent, yet uncorrelated
    assert float(hsic(x, x.square() + 0.1 * noise, **options)) > 2e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype, device: torch.device) -> None:
    x, y = (t.requires_grad_() for t in dependent(20, device, dtype))
    value = hsic(x, y)
    value.backward()
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert x.grad.dtype == y.grad.dtype == dtype
    expected = hsic_reference(x.detach().double(), y.detach().double())
    torch.testing.assert_close(value.detach().double(), expected, rtol=1e-5, atol=0)


def test_non_contiguous_input(device: torch.device) -> None:
    x, y = dependent(20, device)
    strided = x.permute(1, 0, 3, 2).contiguous().permute(1, 0, 3, 2).requires_grad_()
    assert not strided.is_contiguous()
    columns = y.repeat(1, 2)[:, ::2]
    plain = x.clone().requires_grad_()
    a, b = hsic(strided, columns), hsic(plain, columns.contiguous())
    torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    a.backward()
    b.backward()
    torch.testing.assert_close(strided.grad, plain.grad, rtol=1e-9, atol=1e-15)


def test_one_feature_without_a_dimension() -> None:
    x, y = dependent(9)
    assert torch.equal(hsic(x, y[:, 0]), hsic(x, y[:, :1]))


def test_autocast_does_not_reach_the_distances(device: torch.device) -> None:
    x, y = dependent(20, device, torch.float32)
    y.requires_grad_()
    outside = hsic(x, y)
    (expected,) = torch.autograd.grad(outside, y)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        inside = hsic(x, y)
        (grad,) = torch.autograd.grad(inside, y)
    assert torch.equal(inside, outside)
    assert torch.equal(grad, expected)


def test_fast_matmuls_do_not_reach_the_distances(device: torch.device) -> None:
    """`set_float32_matmul_precision` makes the products of the model bfloat16 inside, but not ours."""
    g = torch.Generator().manual_seed(0)
    x = torch.rand(256, 2048, generator=g).to(device)
    y = (x[:, :900] + torch.rand(256, 900, generator=g).to(device)).requires_grad_()
    expected = torch.autograd.grad(hsic(x, y), y)[0]
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        actual = torch.autograd.grad(hsic(x, y), y)[0]
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(actual, expected)


def test_the_median_rule_is_of_full_precision_too(device: torch.device) -> None:
    g = torch.Generator().manual_seed(0)
    x = (100 + torch.rand(64, 2048, generator=g)).to(device)
    expected = gamma(x, 5.0, "median")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(gamma(x, 5.0, "median"), expected)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("permitted", ["highest", "medium"])
def test_threads_hand_the_permission_for_fast_products_back(permitted: str) -> None:
    """It is the process's: two threads inside at once, the first to leave must not give it back, the last must."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(permitted)
    given = torch.backends.mkldnn.matmul.fp32_precision
    both_inside, first_left = threading.Barrier(2), threading.Event()
    seen = []

    def first() -> None:
        with full_precision(torch.device("cpu")):
            both_inside.wait(10)
        first_left.set()

    thread = threading.Thread(target=first)
    with full_precision(torch.device("cpu")):
        thread.start()
        both_inside.wait(10)
        first_left.wait(10)
        seen.append(torch.backends.mkldnn.matmul.fp32_precision)
    thread.join()
    after = torch.backends.mkldnn.matmul.fp32_precision
    torch.set_float32_matmul_precision(before)
    assert after == given and not {"tf32", "bf16"} & set(seen)


@pytest.mark.parametrize("options", OPTIONS[:1] + OPTIONS[3:6], ids=str)
def test_compiles_without_graph_break(options: dict[str, str], device: torch.device) -> None:
    x, y = (t.requires_grad_() for t in dependent(20, device, torch.float32))

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return hsic(x, (2 * y).tanh(), **options)

    expected = torch.autograd.grad(loss(x, y), (x, y))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(x, y), (x, y))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-9)


def test_second_order_gradient() -> None:
    x, y = (t[:, :2].clone().requires_grad_() for t in dependent(6))
    for estimator in ("biased", "unbiased"):
        assert torch.autograd.gradcheck(lambda x, y, e=estimator: 100 * hsic(x, y, estimator=e), (x, y))
        assert torch.autograd.gradgradcheck(
            lambda x, y, e=estimator: 100 * hsic(x, y, estimator=e), (x, y), fast_mode=True
        )


MEMORY = """
import resource, torch
from mimir_fast import hsic
torch.set_num_threads({threads})
def step(n):
    x, y = (torch.randn(n, {d}, requires_grad=True) for _ in range(2))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    hsic(x, y).backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
step(2500)
print(step({n}))
"""


@pytest.mark.parametrize(
    ("n", "d", "limit_mib"), [(6000, 8, 50), pytest.param(32_768, 128, 1024, marks=pytest.mark.slow)], ids=str
)
def test_memory_is_linear_in_samples(n: int, d: int, limit_mib: int, tmp_path: Path) -> None:
    """Forward and backward; one N×N matrix alone would be 137 MiB and 4096 MiB."""
    code = MEMORY.format(n=n, d=d, threads=torch.get_num_threads())
    run = run_code(tmp_path, code)
    assert float(run.stdout) < limit_mib, run.stderr


class TestRefuses:
    def test_integers(self) -> None:
        with pytest.raises(TypeError, match=r"x must be floating point, got torch\.uint8: images are x\.float"):
            hsic(torch.zeros(4, 3, dtype=torch.uint8), torch.rand(4, 3))

    def test_other_types(self) -> None:
        with pytest.raises(TypeError, match=r"y must be a torch\.Tensor"):
            hsic(torch.rand(4, 3), [1.0, 2.0])  # type: ignore[arg-type]

    def test_different_batch_sizes(self) -> None:
        with pytest.raises(ValueError, match=r"same number of samples .* \(4, 3\) and \(5, 3\)"):
            hsic(torch.rand(4, 3), torch.rand(5, 3))

    @pytest.mark.parametrize(("n", "estimator", "least"), [(1, "biased", 2), (0, "biased", 2), (3, "unbiased", 4)])
    def test_too_few_samples(self, n: int, estimator: str, least: int) -> None:
        with pytest.raises(ValueError, match=f"at least {least} samples, got N={n}"):
            hsic(torch.rand(n, 3), torch.rand(n, 3), estimator=estimator)

    def test_no_features(self) -> None:
        with pytest.raises(ValueError, match="at least one feature"):
            hsic(torch.rand(4, 0), torch.rand(4, 3))

    @pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan])
    def test_width_that_is_not_positive(self, sigma: float) -> None:
        with pytest.raises(ValueError, match="sigma must be > 0"):
            hsic(torch.rand(4, 3), torch.rand(4, 3), sigma=(5.0, sigma))

    @pytest.mark.parametrize("option", ["bandwidth", "estimator", "normalizer"])
    def test_unknown_options(self, option: str) -> None:
        with pytest.raises(ValueError, match=f"{option} must be one of .*'mean'"):
            hsic(torch.rand(4, 3), torch.rand(4, 3), **{option: "mean"})

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    @pytest.mark.parametrize("bandwidth", ["reference", "median"])
    def test_numbers_that_are_not_finite(self, bad: float, bandwidth: str) -> None:
        y = torch.rand(4, 3)
        y[2, 1] = bad
        with pytest.raises(ValueError, match="y must be finite, got NaN or Inf"):
            hsic(torch.rand(4, 3), y, bandwidth=bandwidth)

    def test_mixed_devices(self) -> None:
        with pytest.raises(ValueError, match="on one device, got x on cpu, y on meta"):
            hsic(torch.rand(4, 3), torch.rand(4, 3, device="meta"))
