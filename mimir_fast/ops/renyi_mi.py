"""Matrix-based Rényi mutual information of order α (Sánchez Giraldo et al. 2015, Yu et al. 2019; MIMIR App. F).

With trace-normalised kernels A = K/N:   S_α(A) = log2(tr A^α) / (1 − α),   I = S(A) + S(B) − S(A∘B·N)   in bits

Order 2 needs no eigenvalues. With a = K² − 1 = expm1(−2γd²) and b = L² − 1 (entry by entry), means over all pairs,

    I_2 = log2( mean K²L² / (mean K² · mean L²) ) = log2( 1 + (mean ab − mean a · mean b) / ((1 + mean a)(1 + mean b)) )

so it is `pair_sums` at twice γ: one pass, O(N) memory, and no digits lost when the kernels are nearly constant.

What σ decides: with a narrow kernel K is the identity and I = log2 N whatever the data, with a wide one K is constant
and I = 0. The median rule (the default) keeps typical entries at exp(−1/2), where I follows the dependence.
Shapes: N samples, flattened to (N, D).
"""

from math import log

import torch
from torch import Tensor

from mimir_fast.ops._checks import as_samples, check_positive
from mimir_fast.ops._precision import accumulation_dtype
from mimir_fast.ops.dependence.bandwidth import Bandwidth, Sigma, gamma, widths
from mimir_fast.ops.dependence.pair_sums import pair_sums
from mimir_fast.ops.dependence.rbf import rbf_minus_one, rbf_minus_one_reference


def renyi_mi_reference(
    x: Tensor, y: Tensor, *, alpha: float = 2.0, sigma: Sigma = 5.0, bandwidth: Bandwidth = "median"
) -> Tensor:
    """The definition of `renyi_mi`, from eigenvalues for every order, in the dtype of the inputs."""
    x_ND, y_ND = as_samples(x, y)
    sigma_x, sigma_y = widths(sigma)
    k = 1 + rbf_minus_one_reference(x_ND, gamma(x_ND, sigma_x, bandwidth))
    l_ = 1 + rbf_minus_one_reference(y_ND, gamma(y_ND, sigma_y, bandwidth))
    n = k.shape[0]
    s_x, s_y, s_xy = (_entropy_of_spectrum(torch.linalg.eigvalsh(matrix / n), alpha) for matrix in (k, l_, k * l_))
    return s_x + s_y - s_xy


def renyi_mi(
    x: Tensor, y: Tensor, *, alpha: float = 2.0, sigma: Sigma = 5.0, bandwidth: Bandwidth = "median"
) -> Tensor:
    r"""Information in bits that x (N, …) and y (N, …) share; at most log2 N.

    $$I_\alpha = S_\alpha(A) + S_\alpha(B) - S_\alpha(N\, A \circ B), \qquad
    S_\alpha(A) = \frac{\log_2 \mathrm{tr}\, A^\alpha}{1 - \alpha}, \quad A = K/N, \; B = L/N$$

    Args:
        x, y: any floating dtype, N ≥ 2 samples in the first dimension, the rest is flattened.
        alpha: order, > 0. 2 is one pass over the pairs in O(N) memory; other integers take matrix products, the rest
            eigenvalues (N×N float64, O(N³)); 1 is the von Neumann entropy. The authors' code has 1.01.
        sigma: width of both kernels, > 0, or (σ of x, σ of y); not used by `median`.
        bandwidth: as for `hsic`. Here `median` is the default: see above.
    Returns:
        scalar, float32 (float64 if an input is), differentiable to both inputs.
    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: unequal or too few samples, mixed devices, α or σ ≤ 0, unknown bandwidth; NaN or Inf (on CUDA only
            under MIMIR_FAST_DEBUG=1).
    """
    x_ND, y_ND = as_samples(x, y)
    check_positive("alpha", alpha)
    sigma_x, sigma_y = widths(sigma)
    gamma_x, gamma_y = gamma(x_ND, sigma_x, bandwidth), gamma(y_ND, sigma_y, bandwidth)
    n = x_ND.shape[0]
    if alpha == 2:
        s, r, q = pair_sums(x_ND, y_ND, 2 * gamma_x, 2 * gamma_y)
        mean_a, mean_b = r.sum() / n**2, q.sum() / n**2
        value = torch.log1p((s / n**2 - mean_a * mean_b) / ((1 + mean_a) * (1 + mean_b))) / log(2)
    else:
        k, l_ = (rbf_minus_one(x_ND, gamma_x) + 1).double(), (rbf_minus_one(y_ND, gamma_y) + 1).double()
        value = _entropy(k / n, alpha) + _entropy(l_ / n, alpha) - _entropy(k * l_ / n, alpha)
    return value.to(accumulation_dtype(x, y))


def _entropy(a_NN: Tensor, alpha: float) -> Tensor:
    """S_α(A) in bits. The gradient of tr A^α is α A^(α−1) on either route: no division by λ_i − λ_j."""
    if alpha != 1 and float(alpha).is_integer():
        # tr A^α = ⟨A^(α−1), A⟩: one product fewer than the power.
        trace = (torch.linalg.matrix_power(a_NN, int(alpha) - 1) * a_NN).sum()
        return torch.log2(trace) / (1 - alpha)
    return _entropy_of_spectrum(torch.linalg.eigvalsh(a_NN), alpha)


def _entropy_of_spectrum(eigenvalues_N: Tensor, alpha: float) -> Tensor:
    # Rounding makes zero eigenvalues slightly negative; a power of them would be NaN.
    positive = eigenvalues_N.clamp_min(torch.finfo(eigenvalues_N.dtype).eps)
    if alpha == 1:
        return -(positive * positive.log2()).sum()
    return torch.log2(positive.pow(alpha).sum()) / (1 - alpha)
