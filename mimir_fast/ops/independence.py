"""Are x and y independent? A permutation test of HSIC (Gretton et al., "A kernel statistical test of independence",
NIPS 2007).

Under independence, pairing x with a permuted y changes nothing, so the p-value is the share of permutations whose HSIC
is at least that of the data, which counts as one of them (Phipson & Smyth 2010: p is never 0, and the level is exact).

A permutation only re-indexes one kernel matrix. With Kc = H K H, all that depends on it is

    b_π = Σ_ij Kc_ij L_π(i)π(j)        and, for the unbiased estimator,        Σ_i r_i q_π(i)

and with thin factors (`low_rank.py`) of the centred matrices, Kc = F Fᵀ and Lc = G Gᵀ, b_π is

    ‖Fᵀ G_π‖²          both are thin      N·R_x·R_y work a permutation, all in one batched product; no N×N matrix
    Σ F_π ∘ (Lc F_π)   one is thin        N²·R; one product for a batch of permutations
    Σ Kc ∘ Lc_ππ       neither            N²; a copy of rows, one of columns, and one pass

Shapes: N samples, D features, P permutations with the identity first, rank R.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from mimir_fast.ops._checks import as_samples, check_positive
from mimir_fast.ops._precision import accumulation_dtype, full_precision
from mimir_fast.ops.dependence.bandwidth import Bandwidth, Sigma, gamma, widths
from mimir_fast.ops.dependence.low_rank import rbf_factor
from mimir_fast.ops.dependence.pair_tiles import inner_product
from mimir_fast.ops.dependence.rbf import rbf_minus_one
from mimir_fast.ops.hsic import Estimator, Normalizer, check_estimator, hsic_from_sums, hsic_reference
from mimir_fast.philox import Stream, random_bits

# Four samples have 24 arrangements: hardly enough for p < 0.05.
MINIMUM_SAMPLES = 5
# Values this close, relative to the largest, are ties but for rounding; discrete data have many.
_TIE = 1e-6
# Up to this rank, products with a thin factor beat re-indexing N×N matrices (measured on one CPU core).
_MIXED_RANK = 48
# Numbers gathered for one batch of permutations: some MB for a CPU, 1 GiB for a GPU.
_BATCH = {"cpu": 2**20, "cuda": 2**27}


class IndependenceTest(NamedTuple):
    """What `hsic_test` found, as float64 tensors on the device of the inputs.

    Attributes:
        statistic: scalar, HSIC of x and y.
        p_value: scalar in [1/(1 + num_permutations), 1]; small means dependent.
        null: (num_permutations,), HSIC of x and the permuted y.
    """

    statistic: Tensor
    p_value: Tensor
    null: Tensor


def hsic_test_reference(
    x: Tensor, y: Tensor, *, num_permutations: int = 1000, seed: int = 0, bandwidth: Bandwidth = "median",
    sigma: Sigma = 5.0, estimator: Estimator = "biased", normalizer: Normalizer = "n2",
) -> IndependenceTest:  # fmt: skip
    """The definition of `hsic_test`: `hsic_reference` once for each permutation, in float64."""
    x_ND, y_ND = (z.double() for z in as_samples(x, y, minimum=MINIMUM_SAMPLES))
    batches = permutations(len(x_ND), num_permutations, seed, num_permutations, x.device)
    return _result(torch.stack([
        hsic_reference(x_ND, y_ND[permutation], sigma=sigma, bandwidth=bandwidth,
                       estimator=estimator, normalizer=normalizer)
        for perms_PN in batches for permutation in perms_PN
    ]))  # fmt: skip


@torch.no_grad()
def hsic_test(
    x: Tensor, y: Tensor, *, num_permutations: int = 1000, seed: int = 0, bandwidth: Bandwidth = "median",
    sigma: Sigma = 5.0, estimator: Estimator = "biased", normalizer: Normalizer = "n2",
) -> IndependenceTest:  # fmt: skip
    r"""HSIC of x (N, …) and y (N, …) with the p-value of independence, by P permutations π of y.

    $$p = \frac{1 + \#\{\pi : \mathrm{HSIC}(x, y_\pi) \ge \mathrm{HSIC}(x, y)\}}{1 + P}$$

    Memory beside the inputs: O(N·R) where both kernel matrices have low rank R ≤ 4√N (to six digits: one to three
    features, or labels), and up to four N×N matrices (float32; float64 for float64 inputs) otherwise.
    The samples must be exchangeable: those of a time series are not.

    Args:
        x, y: any floating dtype, N ≥ 5 samples in the first dimension, the rest is flattened. Row i of both is sample
            i. Class labels: `torch.nn.functional.one_hot(labels).float()`.
        num_permutations: p is a multiple of 1/(1 + num_permutations).
        seed: the permutations are a function of it and of N, the same on every device.
        bandwidth: `median` heuristic (Gretton et al.), or as in `hsic`.
        sigma, estimator, normalizer: as in `hsic`. The p-value does not depend on `normalizer`.
    Returns:
        (statistic, p_value, null); a constant input has statistic 0 and p-value 1. No gradient: to train, use `hsic`.
    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: unequal or too few samples, mixed devices, σ ≤ 0, unknown option, NaN or Inf, num_permutations < 1.

    Example:
        >>> hsic_test(features, torch.nn.functional.one_hot(domain).float()).p_value < 0.05
    """
    check_positive("num_permutations", num_permutations)
    check_estimator(estimator, normalizer)
    x_ND, y_ND = (z.detach() for z in as_samples(x, y, minimum=MINIMUM_SAMPLES))
    for name, samples_ND in (("x", x_ND), ("y", y_ND)):
        if not bool(samples_ND.isfinite().all()):
            raise ValueError(f"{name} must be finite, got NaN or Inf: look at what produced it")
    n, values = len(x_ND), []
    with full_precision(x.device):
        dtype = accumulation_dtype(x, y)
        sigma_x, sigma_y = widths(sigma)
        kernel_x = CentredKernel(x_ND, gamma(x_ND, sigma_x, bandwidth), dtype)
        kernel_y = CentredKernel(y_ND, gamma(y_ND, sigma_y, bandwidth), dtype)
        r_N, q_N = kernel_x.sums, kernel_y.sums
        # Of each permutation one thin factor is gathered; without one, only the permutations themselves are held.
        width = max((k.factor.shape[1] for k in (kernel_x, kernel_y) if k.factor is not None), default=1)
        size = max(1, _BATCH["cpu" if x.device.type == "cpu" else "cuda"] // (n * width))
        for perms_PN in permutations(n, num_permutations, seed, size, x.device):
            q_PN = q_N[perms_PN]
            # The sums of products of the matrices before centring, which the estimators are written in.
            s_P = permuted_products(kernel_x, kernel_y, perms_PN)
            s_P += 2 / n * (q_PN @ r_N) - r_N.sum() * q_N.sum() / n**2
            values.append(hsic_from_sums(s_P, r_N, q_PN, estimator, normalizer))
    return _result(torch.cat(values))


def _result(values: Tensor) -> IndependenceTest:
    """The test's result from HSIC of all pairings, that of the data first."""
    at_least = values >= values[0] - _TIE * values.abs().max()
    return IndependenceTest(values[0], at_least.double().mean(), values[1:])


def permutations(n: int, count: int, seed: int, size: int, device: torch.device) -> Iterator[Tensor]:
    """The identity and `count` random permutations, each a function of (seed, its number), as (≤ size, n) int64."""
    for numbers in torch.arange(1 + count, device=device).split(size):
        keys = random_bits(seed, Stream.PERMUTATION, 0, numbers, n)
        if numbers[0] == 0:
            keys[0] = torch.arange(n, device=device)
        yield keys.argsort(dim=1, stable=True)


class CentredKernel:
    """H K H of a Gaussian kernel, and the row sums of K − 1.

    Attributes:
        factor: (N, R) float64 F with H K H = F Fᵀ, if it is thin; else None.
        sums: (N,) float64.
    """

    def __init__(self, x_ND: Tensor, gamma: Tensor, dtype: torch.dtype) -> None:
        n = len(x_ND)
        self.factor = rbf_factor(x_ND, gamma, min(n, round(4 * n**0.5)))
        self._dtype = dtype
        if self.factor is not None:
            self.sums = self.factor @ self.factor.sum(dim=0) - n
            self.factor -= self.factor.mean(dim=0)
            return
        self._matrix = rbf_minus_one(x_ND, gamma).to(dtype)
        self.sums = self._matrix.sum(dim=1, dtype=torch.float64)
        means = self.sums / n
        self._matrix -= means[:, None].to(dtype)
        self._matrix -= (means - means.mean()).to(dtype)

    @cached_property
    def matrix(self) -> Tensor:
        """(N, N) of the dtype given."""
        if self.factor is None:
            return self._matrix
        factor = self.factor.to(self._dtype)
        return factor @ factor.T


def permuted_products(kernel_x: CentredKernel, kernel_y: CentredKernel, perms_PN: Tensor) -> Tensor:
    """(P,) float64 Σ_ij K_ij L_π(i)π(j) of the centred matrices."""
    f_NR, g_NR = kernel_x.factor, kernel_y.factor
    if f_NR is not None and g_NR is not None:
        return (f_NR.T @ g_NR[perms_PN]).square().sum(dim=(1, 2))
    if g_NR is not None and g_NR.shape[1] <= _MIXED_RANK:
        return _products_with_thin(kernel_x.matrix, g_NR, perms_PN)
    if f_NR is not None and f_NR.shape[1] <= _MIXED_RANK:
        # Permuting L is permuting K backwards.
        return _products_with_thin(kernel_y.matrix, f_NR, perms_PN.argsort(dim=1))
    k, l_ = kernel_x.matrix, kernel_y.matrix
    # Each is N² work: nothing is gained by more of them at a time.
    products = [inner_product(k, l_.index_select(0, p).index_select(1, p)) for p in perms_PN]
    return torch.stack([torch.as_tensor(b, dtype=torch.float64, device=k.device) for b in products])


def _products_with_thin(k_NN: Tensor, g_NR: Tensor, perms_PN: Tensor) -> Tensor:
    g_NPR = g_NR.to(k_NN.dtype)[perms_PN.T]
    return ((k_NN @ g_NPR.flatten(1)).view_as(g_NPR) * g_NPR).sum(dim=(0, 2), dtype=torch.float64)
