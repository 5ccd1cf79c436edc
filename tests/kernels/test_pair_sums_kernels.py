"""Triton kernels of the sums over pairs: the dense and the streaming regime against the float64 definition.

Without a GPU the kernels are interpreted. Fresh memory is filled with NaN, so an output or workspace that a kernel
reads before writing shows.
"""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
gram, laplacian, pair_sums, pair_tiles = (
    pytest.importorskip(f"mimir_kernels.{name}") for name in ("gram", "laplacian", "pair_sums", "pair_tiles")
)

# (N, D_x, D_y): the awkward ones; two tiles a side, one sample, one feature, an odd number of everything
THREE_TILES = pytest.param((129, 20, 40), marks=pytest.mark.slow)
SHAPES = [(67, 150, 33), (1, 1, 1), (2, 33, 1), (13, 60, 128), (64, 16, 8), THREE_TILES]


@pytest.fixture(autouse=True)
def fresh_memory_is_nan() -> Iterator[None]:
    """`torch.empty` gives NaN while a test runs."""
    flag, fill = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(flag)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(params=["dense", "streaming"])
def regime(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Small problems are dense by themselves; here they stream too, in panels of one row of tiles."""
    if request.param == "streaming":
        monkeypatch.setattr(pair_sums, "DENSE_ROWS", 0)
        monkeypatch.setattr(pair_sums, "PANEL_BYTES", 0)
        monkeypatch.setattr(pair_tiles, "PANEL_BLOCKS", 1)
    return request.param


def samples(n: int, d: int, seed: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """(n, d), far from centred."""
    return (torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + 3).to(device, dtype)


def scalar(value: float, device: torch.device) -> Tensor:
    return torch.full((), value, dtype=torch.float64, device=device)


def rbf_minus_one(x: Tensor, gamma: Tensor) -> Tensor:
    """The definition: direct differences, float64."""
    x = x.double()
    return torch.expm1(-gamma * (x[:, None] - x[None, :]).square().sum(-1))


def sums(x: Tensor, y: Tensor, gamma_x: Tensor, gamma_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    k, l_ = rbf_minus_one(x, gamma_x), rbf_minus_one(y, gamma_y)
    return (k * l_).sum(), k.sum(1), l_.sum(1)


def biased_hsic(s: Tensor, r: Tensor, q: Tensor) -> Tensor:
    n = len(r)
    return (s - 2 / n * (r * q).sum() + r.sum() * q.sum() / n**2) / n**2


def unbiased_hsic(s: Tensor, r: Tensor, q: Tensor) -> Tensor:
    n = len(r)
    return (s - 2 / (n - 2) * (r * q).sum() + r.sum() * q.sum() / ((n - 1) * (n - 2))) / (n * (n - 3))


def renyi_information(s: Tensor, r: Tensor, q: Tensor) -> Tensor:
    """Order 2, from sums at twice γ: K² is a Gaussian kernel too."""
    n2 = len(r) ** 2
    return torch.log2((n2 + r.sum() + q.sum() + s) * n2 / ((n2 + r.sum()) * (n2 + q.sum())))


def relative_error(actual: Tensor, wanted: Tensor) -> float:
    return ((actual.double() - wanted).norm() / wanted.norm().clamp_min(1e-300)).item()


def estimate_and_gradients(
    estimator: Callable[..., Tensor], x: Tensor, y: Tensor, gamma_x: Tensor, gamma_y: Tensor, *, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As the op does it: kernel sums, autograd through the scalar formula, kernel adjoint."""
    s, r, q, k, l_, *_ = pair_sums.forward(x, y, gamma_x, gamma_y, keep)
    leaves = [t.requires_grad_() for t in (s, r, q)]
    value = estimator(*leaves)
    grads = torch.autograd.grad(value, leaves)
    return value, *pair_sums.backward(*grads, x, y, gamma_x, gamma_y, k, l_, True, True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_match_definition(shape, regime, triton_device):
    n, d_x, d_y = shape
    x, y = samples(n, d_x, 0, triton_device), samples(n, d_y, 1, triton_device)
    gammas = scalar(0.02 / d_x, triton_device), scalar(0.5 / d_y, triton_device)
    actual = pair_sums.forward(x, y, *gammas, False)[:3]
    for a, wanted in zip(actual, sums(x, y, *gammas), strict=True):
        assert a.dtype == torch.float64
        assert relative_error(a, wanted) < 2e-6 or a.abs().max() < 1e-12


@pytest.mark.parametrize("shape", [(67, 150, 33), (2, 33, 1), (13, 60, 128), THREE_TILES], ids=str)
def test_gradients_match_autograd_of_definition(shape, regime, triton_device):
    n, d_x, d_y = shape
    x, y = samples(n, d_x, 0, triton_device), samples(n, d_y, 1, triton_device)
    gammas = scalar(0.02 / d_x, triton_device), scalar(0.5 / d_y, triton_device)
    _, grad_x, grad_y = estimate_and_gradients(biased_hsic, x, y, *gammas, keep=False)
    exact = [t.double().requires_grad_() for t in (x, y)]
    wanted = torch.autograd.grad(biased_hsic(*sums(*exact, *gammas)), exact)
    for actual, want in zip((grad_x, grad_y), wanted, strict=True):
        assert actual.dtype == torch.float32
        assert relative_error(actual, want) < 3e-5


@pytest.mark.parametrize("estimator", [biased_hsic, unbiased_hsic, renyi_information])
def test_estimators_meet_the_accuracy_target(estimator, regime, triton_device):
    """Value to 1e-5 and gradient to 1e-4 where kernels are nearly constant, 0.999 off the diagonal."""
    n, d_x, d_y = 40, 400, 80
    scene, basis = samples(n, 4, 0, triton_device) - 3, samples(4, d_x + d_y, 1, triton_device) - 3
    x = 0.5 + 0.05 * scene @ basis[:, :d_x] + 0.05 * (samples(n, d_x, 2, triton_device) - 3)
    y = torch.tanh(scene @ basis[:, d_x:])
    gammas = scalar(1 / (2 * 25 * 0.02 * d_x), triton_device), scalar(1 / (2 * 25 * d_y), triton_device)
    if estimator is renyi_information:  # its kernels must not be constant, or it is zero
        gammas = scalar(32 / d_x, triton_device), scalar(1 / d_y, triton_device)
    value, *grads = estimate_and_gradients(estimator, x, y, *gammas, keep=regime == "dense")
    exact = [t.double().requires_grad_() for t in (x, y)]
    wanted = estimator(*sums(*exact, *gammas))
    assert relative_error(value.detach(), wanted.detach()) < 1e-5
    for actual, want in zip(grads, torch.autograd.grad(wanted, exact), strict=True):
        assert relative_error(actual, want) < 1e-4


def test_distances_far_smaller_than_norms(triton_device):
    """Image-like: all samples share a mean a hundred times their differences; centring comes first."""
    x = 100 + samples(16, 300, 0, triton_device) / 10
    gamma = scalar(1 / 300, triton_device)
    s, r, *_ = pair_sums.forward(x, x.clone(), gamma, gamma, False)
    wanted_s, wanted_r, _ = sums(x, x, gamma, gamma)
    assert relative_error(s, wanted_s) < 1e-5
    assert relative_error(r, wanted_r) < 1e-5


@pytest.mark.parametrize("need_x, need_y", [(True, False), (False, True)])
def test_one_gradient_alone(need_x, need_y, regime, triton_device):
    x, y = samples(20, 12, 0, triton_device), samples(20, 7, 1, triton_device)
    gamma, ones = scalar(0.1, triton_device), torch.ones(20, dtype=torch.float64, device=triton_device)
    empty = x.new_empty(0, 0)
    args = (gamma, ones, ones, x, y, gamma, gamma, empty, empty)
    both = pair_sums.backward(*args, True, True)
    alone = pair_sums.backward(*args, need_x, need_y)
    for wanted, actual, needed in zip(both, alone, (need_x, need_y), strict=True):
        assert torch.equal(actual, wanted if needed else wanted[:0])


def test_kept_matrices_give_the_same_bits(triton_device):
    x, y = samples(30, 12, 0, triton_device), samples(30, 7, 1, triton_device)
    gamma = scalar(0.1, triton_device)
    kept = estimate_and_gradients(biased_hsic, x, y, gamma, gamma, keep=True)
    again = estimate_and_gradients(biased_hsic, x, y, gamma, gamma, keep=False)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_same_input_twice_needs_one_matrix(regime, triton_device):
    """CKA asks for HSIC(x, x); the short cut gives what the long way gives."""
    x, gamma = samples(70, 12, 0, triton_device), scalar(0.1, triton_device)
    short = pair_sums.forward(x, x, gamma, gamma, False)
    long = pair_sums.forward(x, x.clone(), gamma, gamma, False)
    for a, b in zip(short[:3], long[:3], strict=True):
        assert relative_error(a, b) < 1e-7


def test_same_bits_every_time(regime, triton_device):
    x, y = samples(66, 16, 0, triton_device), samples(66, 8, 1, triton_device)
    gamma = scalar(0.05, triton_device)
    runs = [estimate_and_gradients(biased_hsic, x, y, gamma, gamma, keep=False) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_strides_and_half_precision(triton_device):
    """Transposed and sliced inputs are read as they lie or copied; bf16 is exact in fp32."""
    x, y = samples(24, 18, 0, triton_device).t(), samples(18, 64, 1, triton_device)[:, ::2]
    gamma = scalar(0.05, triton_device)
    for dtype in (torch.float32, torch.bfloat16):
        a, b = x.to(dtype), y.to(dtype)
        strided = pair_sums.forward(a, b, gamma, gamma, False)
        contiguous = pair_sums.forward(a.float().contiguous(), b.float().contiguous(), gamma, gamma, False)
        assert all(torch.equal(u, v) for u, v in zip(strided[:3], contiguous[:3], strict=True))


# Hopper's own tile with three splits, at a size that interprets; a tile for old GPUs; the library's products.
WAYS = {
    "sm_90, 3 splits": lambda: partial(gram.gram_splits, config=gram.gram_config(90), splits=3),
    "sm_80, 1 split": lambda: partial(gram.gram_splits, config=gram.gram_config(80), splits=1),
    "library": lambda: partial(gram.gram_by_library, block=64, chunk=96),
}
# Two of Hopper's tiles a side and three splits take the interpreter ten seconds.
LARGE = pytest.param((140, 320, 33), marks=pytest.mark.slow)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(67, 160, 33), (13, 60, 128), LARGE], ids=str)
def test_every_way_to_a_gram_matrix(shape, way, triton_device):
    """The configuration a GPU would choose is a function of its model: here each is asked for by name."""
    n, d_x, d_y = shape
    x, y = samples(n, d_x, 0, triton_device), samples(n, d_y, 1, triton_device)
    gammas = scalar(0.02 / d_x, triton_device), scalar(0.5 / d_y, triton_device)
    s, r, q, k, l_, *_ = pair_sums.forward(x, y, *gammas, True, gram=WAYS[way]())
    wanted = (*sums(x, y, *gammas), rbf_minus_one(x, gammas[0]), rbf_minus_one(y, gammas[1]))
    for actual, want in zip((s, r, q, k, l_), wanted, strict=True):
        assert relative_error(actual, want) < 2e-6
    assert torch.equal(k, k.T) and torch.equal(l_, l_.T)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(67, 160, 33), (13, 60, 128), (2, 5, 3), LARGE], ids=str)
def test_the_median_rule_from_the_gram_matrix_at_hand(shape, way, triton_device):
    n, d_x, d_y = shape
    x, y = samples(n, d_x, 0, triton_device), samples(n, d_y, 1, triton_device)
    later = x.new_empty(0, dtype=torch.float64)
    *found, gamma_x, gamma_y = pair_sums.forward(x, y, later, later, True, gram=WAYS[way]())
    for t, gamma in ((x, gamma_x), (y, gamma_y)):
        median = torch.nn.functional.pdist(t.double()).square().median()
        torch.testing.assert_close(gamma, 1 / (2 * median), rtol=1e-5, atol=0)
    known = pair_sums.forward(x, y, gamma_x, gamma_y, True, gram=WAYS[way]())
    assert all(torch.equal(a, b) for a, b in zip(found, known, strict=False))


@pytest.mark.parametrize("capability, splits", [(90, 3), (90, 1), (80, 2)])
def test_gradient_by_the_tiles_of_each_generation(capability, splits, triton_device):
    n, d = 140, 130
    x, gamma = samples(n, d, 0, triton_device), scalar(0.1, triton_device)
    weights = samples(n, n, 1, triton_device)
    weights = weights + weights.T
    out = torch.empty(n, d, device=triton_device)
    config = laplacian.laplacian_config(capability)
    laplacian.laplacian_product(weights, gram.center_rows(x), gamma, out, 0, config=config, splits=splits)
    exact = x.double()
    wanted = -0.4 * (weights.double().sum(1, keepdim=True) * exact - weights.double() @ exact)
    assert relative_error(out, wanted) < 3e-5


def test_halves_of_a_number_carry_seventeen_bits(triton_device):
    x = samples(20, 300, 0, triton_device) * 100
    halves = gram.center_rows(x)
    centred = x.double() - gram.middle(x).double()
    assert relative_error(halves.hi_ND.double() + halves.lo_ND.double(), centred) < 2**-17
    assert relative_error(halves.norms_N, centred.square().sum(1)) < 1e-6


def test_the_middle_reads_few_rows():
    """A third of a deviation from the mean at most; exact for a constant, of which CKA makes an exact zero."""
    x = samples(200, 50, 0, torch.device("cpu")) + 100
    poisoned = x.clone()
    poisoned[1::2] = torch.nan  # two hundred rows are read in steps of twelve
    assert torch.equal(gram.middle(poisoned), gram.middle(x))
    assert (gram.middle(x) - x.mean(0)).square().mean() < 2 / gram.SHIFT_ROWS
    assert torch.equal(gram.middle(torch.full((37, 3), 0.1)), torch.full((3,), 0.1))
    before = gram.middle(x)
    x[0] = 1e6  # one of those that are read
    assert (gram.middle(x) - before).abs().max() < 1


@pytest.mark.parametrize(
    "num_rows, splits", [(512, 13), (1024, 11), (256, 44), (4096, 1)], ids=lambda value: f"{value}"
)
def test_splits_fill_waves(num_rows, splits):
    """On 132 processors, D = 150,528. N = 512 has 10 tiles: 13 splits leave 2 processors idle in a single wave."""
    blocks = num_rows // 128
    num_tiles = blocks * (blocks + 1) // 2
    assert gram.num_splits(num_tiles, 150_528, 132) == splits
    waves = -(-num_tiles * splits // 132)
    assert num_tiles * splits >= 0.97 * 132 * waves
    assert gram.num_splits(num_tiles, 200, 132) == 1  # too short to share


def test_tiles_are_made_for_the_memory_of_the_device():
    """A GPU of tomorrow takes the tiles of the one before it, if it has the memory."""
    for config in (gram.gram_config, laplacian.laplacian_config):
        assert config(121, 101_376) == config(120)
        assert config(110, 232_448) == config(103)
        assert config(90, 101_376) == config(110, 101_376) == gram.SMALLEST


@pytest.mark.cuda
def test_more_features_than_the_second_axis_of_a_grid():
    device = torch.device("cuda")
    x, weights = samples(2, 65_536 * 128, 0, device), torch.ones(2, 2, device=device)
    out = torch.empty_like(x)
    laplacian.laplacian_product(weights, gram.center_rows(x), scalar(0.25, device), out, 0)
    torch.testing.assert_close(out, x.flip(0) - x, rtol=1e-3, atol=1e-3)


def test_an_unneeded_gradient_reads_nothing(triton_device, monkeypatch):
    """Training wants ∂z only: with the kernel matrices kept, the images are not centred again."""
    x, y = samples(20, 12, 0, triton_device), samples(20, 7, 1, triton_device)
    gamma, ones = scalar(0.1, triton_device), torch.ones(20, dtype=torch.float64, device=triton_device)
    _, _, _, k, l_, *_ = pair_sums.forward(x, y, gamma, gamma, True)
    wanted = pair_sums.backward(gamma, ones, ones, x, y, gamma, gamma, k, l_, True, True)[1]
    actual = pair_sums.backward(gamma, ones, ones, x * torch.nan, y, gamma, gamma, k, l_, False, True)
    assert actual[0].shape == (0, 12) and torch.equal(actual[1], wanted)


@triton.jit
def _triangular_index_kernel(t_ptr, i_ptr, j_ptr):
    i, j = gram.triangular_index(tl.load(t_ptr + tl.program_id(0)))
    tl.store(i_ptr + tl.program_id(0), i)
    tl.store(j_ptr + tl.program_id(0), j)


def test_triangular_index_counts_the_lower_triangle(triton_device):
    """The float root may be one off; far out, at N = 5 million, the correction still lands."""
    corners = [i * (i + 1) // 2 for i in (1, 2, 3, 180, 4096, 16_384, 40_000)]
    t = torch.tensor([0, *corners, *[c - 1 for c in corners]], dtype=torch.int32, device=triton_device)
    i, j = torch.empty_like(t), torch.empty_like(t)
    _triangular_index_kernel[(len(t),)](t, i, j)
    assert bool(((j >= 0) & (j <= i)).all())
    assert torch.equal(i * (i + 1) // 2 + j, t)


@pytest.mark.cuda
@pytest.mark.parametrize("shape", [(512, 150_528, 768), (2048, 37_632, 768)], ids=str)
def test_accuracy_on_image_like_data(shape):
    """The target at full size, on tensor cores: value to 1e-5, gradient to 1e-4 of float64, kernel around 0.9996."""
    n, d_x, d_y = shape
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    base = torch.rand(d_x, generator=generator, device=device)
    scene = torch.randn(n, 16, generator=generator, device=device)
    x = base + 0.05 * scene @ torch.randn(16, d_x, generator=generator, device=device) / 4
    x = (x + 0.1 * torch.randn(n, d_x, generator=generator, device=device)).clamp_(0, 1)
    y = torch.tanh(scene @ torch.randn(16, d_y, generator=generator, device=device))
    gammas = scalar(1 / (50 * d_x), device), scalar(1 / (50 * d_y), device)
    value, *grads = estimate_and_gradients(biased_hsic, x, y, *gammas, keep=True)
    exact = [t.double().requires_grad_() for t in (x, y)]
    matrices = []
    for t, gamma in zip(exact, gammas, strict=True):
        gram = t @ t.T
        d2 = gram.diagonal()[:, None] + gram.diagonal() - 2 * gram
        matrices.append(torch.expm1(-gamma * d2.fill_diagonal_(0)))
    k, l_ = matrices
    wanted = biased_hsic((k * l_).sum(), k.sum(1), l_.sum(1))
    assert relative_error(value.detach(), wanted.detach()) < 1e-5
    for actual, want in zip(grads, torch.autograd.grad(wanted, exact), strict=True):
        assert relative_error(actual, want) < 1e-4


@pytest.mark.cuda
def test_streaming_memory_is_linear_in_samples():
    """N = 32,768 with gradients within 1 GiB beside inputs and gradients; two kernel matrices would take 8 GiB."""
    device, gamma = torch.device("cuda"), scalar(1e-3, torch.device("cuda"))
    x, y = samples(32_768, 128, 0, device), samples(32_768, 128, 1, device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    estimate_and_gradients(biased_hsic, x, y, gamma, gamma, keep=False)
    assert torch.cuda.max_memory_allocated() - before < 2**30
