"""Hilbert-Schmidt independence criterion with Gaussian kernels.

    HSIC_b(x, y) = tr(K H L H) / c        K_ij = exp(−γ_x ‖x_i − x_j‖²),  L likewise,  H = I − 11ᵀ/N

Gretton et al. 2005; MIMIR (arXiv 2312.04960) Eq. 25/29. Written out, only the sums of `pair_sums` are left, which one
pass over the pairs gives: s = Σ k_ij l_ij, r_i = Σ_j k_ij, q_i = Σ_j l_ij with k = K − 1, l = L − 1 (all of it is
invariant to adding a constant to the off-diagonal entries).
Shapes: N samples, flattened to (N, D).
"""

from typing import Literal

from torch import Tensor

from mimir_fast.ops._checks import as_samples, check_choice
from mimir_fast.ops._precision import accumulation_dtype
from mimir_fast.ops.dependence.bandwidth import Bandwidth, Sigma, gamma, gamma_or_later, widths
from mimir_fast.ops.dependence.pair_sums import pair_sums, pair_sums_reference

Estimator = Literal["biased", "unbiased"]
Normalizer = Literal["n2", "(n-1)^2"]
ESTIMATORS, NORMALIZERS = ("biased", "unbiased"), ("n2", "(n-1)^2")


def hsic_from_sums(s: Tensor, r_N: Tensor, q_N: Tensor, estimator: Estimator, normalizer: Normalizer = "n2") -> Tensor:
    """The float64 scalar from `pair_sums`, or (P,) of them for s (P,) and q (P, N).

    The unbiased estimator cancels three digits, hence float64.
    """
    n = r_N.shape[0]
    product, totals = (r_N * q_N).sum(dim=-1), r_N.sum() * q_N.sum(dim=-1)
    if estimator == "biased":
        return (s - 2 / n * product + totals / n**2) / (n**2 if normalizer == "n2" else (n - 1) ** 2)
    return (s - 2 / (n - 2) * product + totals / ((n - 1) * (n - 2))) / (n * (n - 3))


def check_estimator(estimator: str, normalizer: str = "n2") -> int:
    """The least number of samples the estimator is defined for.

    Raises:
        ValueError: unknown estimator or normalizer.
    """
    check_choice("estimator", estimator, ESTIMATORS)
    check_choice("normalizer", normalizer, NORMALIZERS)
    return 4 if estimator == "unbiased" else 2


def hsic_reference(
    x: Tensor,
    y: Tensor,
    *,
    sigma: Sigma = 5.0,
    bandwidth: Bandwidth = "reference",
    estimator: Estimator = "biased",
    normalizer: Normalizer = "n2",
) -> Tensor:
    """The definition of `hsic`, from N×N matrices, in the dtype of the inputs."""
    x_ND, y_ND = as_samples(x, y, minimum=check_estimator(estimator, normalizer))
    sigma_x, sigma_y = widths(sigma)
    gamma_x, gamma_y = gamma(x_ND, sigma_x, bandwidth), gamma(y_ND, sigma_y, bandwidth)
    value = hsic_from_sums(*pair_sums_reference(x_ND, y_ND, gamma_x, gamma_y), estimator, normalizer)
    return value.to(x.dtype)


def hsic(
    x: Tensor,
    y: Tensor,
    *,
    sigma: Sigma = 5.0,
    bandwidth: Bandwidth = "reference",
    estimator: Estimator = "biased",
    normalizer: Normalizer = "n2",
) -> Tensor:
    r"""Scalar dependence of x (N, …) and y (N, …); zero in the limit if and only if they are independent.

    $$\mathrm{HSIC}_b = \frac{\mathrm{tr}(KHLH)}{c}, \qquad
    \mathrm{HSIC}_u = \frac{1}{N(N-3)}\left[\mathrm{tr}(\tilde K \tilde L)
    + \frac{\mathbf 1^\top \tilde K \mathbf 1\; \mathbf 1^\top \tilde L \mathbf 1}{(N-1)(N-2)}
    - \frac{2\,\mathbf 1^\top \tilde K \tilde L \mathbf 1}{N-2}\right]$$

    with $K_{ij} = e^{-\gamma_x \lVert x_i - x_j \rVert^2}$, L likewise, $H = I - \tfrac1N \mathbf 1 \mathbf 1^\top$,
    and $\tilde K$, $\tilde L$ the kernels with a zero diagonal.

    O(N) memory beside the inputs and their gradients, forward and backward (up to 2048 samples on a CPU, the two
    kernel matrices are kept instead of computed twice).

    Works under autocast, `torch.compile(fullgraph=True)` and DDP. With `create_graph=True`, under `torch.func` and in
    forward mode the definition computes it, in N×N memory; derivatives of any order are right.

    Args:
        x, y: any floating dtype, N samples in the first dimension, the rest is flattened. Row i of both is sample i.
        sigma: width of both kernels, > 0, or (σ of x, σ of y); not used by `median`.
        bandwidth: γ is $1/(2\sigma^2)$ for `paper`, $1/(2\sigma^2 D)$ for `reference` (the authors' code), and
            $1/(2\,\mathrm{median}_{i<j} d_{ij}^2)$ for `median` (on the device, no gradient through it).
        estimator: `biased` (V-statistic, N ≥ 2) or `unbiased` (Song et al. 2012, Eq. 5, N ≥ 4; may be negative).
        normalizer: of the biased estimator, 1/N² (MIMIR) or 1/(N−1)² (Gretton).
    Returns:
        scalar, float32 (float64 if an input is), differentiable to both inputs.
    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: unequal or too few samples, mixed devices, σ ≤ 0, unknown option; NaN or Inf (on CUDA only under
            MIMIR_FAST_DEBUG=1, as looking makes the host wait).

    Example:
        >>> loss = cross_entropy + hsic(images, features, bandwidth="median")
    """
    x_ND, y_ND = as_samples(x, y, minimum=check_estimator(estimator, normalizer))
    sigma_x, sigma_y = widths(sigma)
    gamma_x, gamma_y = gamma_or_later(x_ND, sigma_x, bandwidth), gamma_or_later(y_ND, sigma_y, bandwidth)
    value = hsic_from_sums(*pair_sums(x_ND, y_ND, gamma_x, gamma_y), estimator, normalizer)
    return value.to(accumulation_dtype(x, y))
