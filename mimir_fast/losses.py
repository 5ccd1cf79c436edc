"""The dependence estimators as modules, for a training loop or a `nn.ModuleDict` of losses.

Both are stateless: no parameters, no buffers; moving, saving and compiling them is free. Where a function will do, use
`hsic`, `nhsic`, `renyi_mi` or `cka`.
Shapes: N samples; x (N, …), z (N, …).
"""

from typing import Any, Literal, get_args

from torch import Tensor, nn

from mimir_fast.ops._checks import check_choice, check_positive
from mimir_fast.ops.dependence.bandwidth import BANDWIDTHS, Bandwidth
from mimir_fast.ops.global_batch import gather_batch
from mimir_fast.ops.global_hsic import global_hsic
from mimir_fast.ops.hsic import Estimator, Normalizer, check_estimator, hsic
from mimir_fast.ops.nhsic import nhsic
from mimir_fast.ops.renyi_mi import renyi_mi

Information = Literal["hsic", "nhsic", "renyi"]


class HSICLoss(nn.Module):
    """Dependence of two batches, to be made small (or, negated, large). The options are those of `hsic`.

    Args:
        global_batch: estimate over the samples of all ranks (`global_hsic`) instead of this rank's.

    Example:
        >>> penalty = HSICLoss(bandwidth="median", estimator="unbiased")
        >>> loss = cross_entropy + 0.1 * penalty(features, domain)
    """

    def __init__(
        self,
        *,
        sigma_x: float = 5.0,
        sigma_y: float = 5.0,
        bandwidth: Bandwidth = "reference",
        estimator: Estimator = "biased",
        normalizer: Normalizer = "n2",
        global_batch: bool = False,
    ):
        super().__init__()
        check_positive("sigma_x", sigma_x)
        check_positive("sigma_y", sigma_y)
        check_choice("bandwidth", bandwidth, BANDWIDTHS)
        check_estimator(estimator, normalizer)
        self.sigma_x, self.sigma_y, self.bandwidth = sigma_x, sigma_y, bandwidth
        self.estimator, self.normalizer, self.global_batch = estimator, normalizer, global_batch

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Scalar, differentiable to x (N, …) and y (N, …)."""
        options: dict[str, Any] = {"sigma_x": self.sigma_x, "sigma_y": self.sigma_y, "bandwidth": self.bandwidth}
        estimate = global_hsic if self.global_batch else hsic
        return estimate(x, y, **options, estimator=self.estimator, normalizer=self.normalizer)

    def extra_repr(self) -> str:
        return (
            f"sigma_x={self.sigma_x}, sigma_y={self.sigma_y}, bandwidth={self.bandwidth!r}, "
            f"estimator={self.estimator!r}, normalizer={self.normalizer!r}, global_batch={self.global_batch}"
        )


class MutualInformationPenalty(nn.Module):
    """MIMIR's regulariser λ·I(x, z) of images x and latents z (arXiv 2312.04960, Algorithm 1).

    Args:
        estimator: `hsic` (the paper), `nhsic` (the authors' code) or `renyi` (the paper's appendix F). λ does not carry
            over from one to another: their values differ by orders of magnitude.
        weight: λ ≥ 0.
        sigma: width of both kernels, > 0; not used by `median`.
        bandwidth: `reference`, `paper` or `median`; `nhsic` is defined with `reference` only.
        alpha: order of `renyi`, > 0.
        global_batch: estimate over the samples of all ranks.

    Example:
        >>> penalty = MutualInformationPenalty(estimator="hsic", weight=1e-5)
        >>> loss = reconstruction + penalty(adversarial_images, latents)
    """

    def __init__(
        self,
        *,
        estimator: Information = "hsic",
        weight: float = 1e-5,
        sigma: float = 5.0,
        bandwidth: Bandwidth | None = None,
        alpha: float = 2.0,
        global_batch: bool = False,
    ):
        super().__init__()
        check_choice("estimator", estimator, get_args(Information))
        check_positive("sigma", sigma)
        check_positive("alpha", alpha)
        if not weight >= 0:
            raise ValueError(f"weight must be >= 0, got {weight}")
        if bandwidth is None:
            # Of the Rényi information only the median rule keeps off the ends of the scale: see ops/renyi_mi.py.
            bandwidth = "median" if estimator == "renyi" else "reference"
        check_choice("bandwidth", bandwidth, BANDWIDTHS)
        if estimator == "nhsic" and bandwidth != "reference":
            raise ValueError(f"nhsic is defined with bandwidth='reference', got {bandwidth!r}: use that, or 'hsic'")
        self.estimator, self.weight, self.sigma = estimator, weight, sigma
        self.bandwidth, self.alpha, self.global_batch = bandwidth, alpha, global_batch

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """λ·I(x, z), a scalar differentiable to both; detach x (N, …) to train the encoder of z (N, …) only."""
        if self.estimator == "hsic":
            estimate = global_hsic if self.global_batch else hsic
            return self.weight * estimate(x, z, sigma_x=self.sigma, sigma_y=self.sigma, bandwidth=self.bandwidth)
        if self.global_batch:
            x, z = gather_batch(x), gather_batch(z)
        if self.estimator == "nhsic":
            return self.weight * nhsic(x, z, sigma=self.sigma)
        return self.weight * renyi_mi(x, z, alpha=self.alpha, sigma=self.sigma, bandwidth=self.bandwidth)

    def extra_repr(self) -> str:
        return (
            f"estimator={self.estimator!r}, weight={self.weight}, sigma={self.sigma}, bandwidth={self.bandwidth!r}, "
            f"alpha={self.alpha}, global_batch={self.global_batch}"
        )
