"""The dependence estimators as modules, for a training loop or a `nn.ModuleDict` of losses.

All are stateless: no parameters, no buffers; moving, saving and compiling them is free. Where a function will do, use
`hsic`, `nhsic`, `renyi_mi` or `cka`. Each returns the dependence itself: a loss makes it small, its negative large.
Shapes: N samples; x (N, …), y (N, …).
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from mimir_fast.ops._checks import check_choice, check_not_negative, check_positive
from mimir_fast.ops.cka import KERNELS, Kernel, cka
from mimir_fast.ops.dependence.bandwidth import BANDWIDTHS, Bandwidth, Sigma, widths
from mimir_fast.ops.global_batch import gather_batch
from mimir_fast.ops.global_hsic import global_hsic
from mimir_fast.ops.hsic import Estimator, Normalizer, check_estimator, hsic
from mimir_fast.ops.nhsic import nhsic
from mimir_fast.ops.renyi_mi import renyi_mi

Information = Literal["hsic", "nhsic", "renyi"]


def gradient_share(penalty: Tensor, loss: Tensor, parameters: Tensor | Iterable[Tensor]) -> Tensor:
    r"""How much a penalty steers: the norm of its gradient over that of the loss's.

    $$\lVert \nabla_\theta\, \mathrm{penalty} \rVert_2 \;/\; \lVert \nabla_\theta\, \mathrm{loss} \rVert_2$$

    A share of 1e-8 does nothing, whatever the penalty measures; one above 1 drowns the loss. Values do not tell, as
    each estimator has a scale of its own. Look at the first step and at a later one: it costs two backward passes.

    Args:
        penalty, loss: scalars of one forward pass, the penalty with its weight. Their graph is kept.
        parameters: those that train, or one; what only one of the two reaches counts as zero for the other.
    Returns:
        float64 scalar; inf where the loss does not reach the parameters.
    Raises:
        RuntimeError: one of them has no graph.
        ValueError: neither reaches any of the parameters, of which 0/0 says nothing.

    Example:
        >>> float(gradient_share(0.1 * hsic(x, features), cross_entropy, model.parameters()))
    """
    several = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    trained = [p for p in several if p.requires_grad]
    found = [_gradients(value, trained) for value in (penalty, loss)] if trained else []
    if not any(found):
        raise ValueError(
            f"neither penalty nor loss depends on any of the {len(several)} parameters: give those of the model that "
            "made them (model.parameters(), or one weight), not copies or views"
        )
    steering, leading = (_norm(gradients, loss) for gradients in found)
    return steering / leading


def _gradients(value: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return [gradient for gradient in found if gradient is not None]


def _norm(gradients: list[Tensor], like: Tensor) -> Tensor:
    norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients]
    return torch.stack(norms).norm() if norms else like.new_zeros((), dtype=torch.float64)


class _Dependence(nn.Module):
    """An estimator with its options, checked when built."""

    def __init__(self, estimate: Callable[..., Tensor], options: dict[str, Any], global_batch: bool):
        super().__init__()
        self.estimate, self.options, self.global_batch = estimate, options, global_batch

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Scalar, differentiable to x (N, …) and y (N, …)."""
        if self.global_batch:
            x, y = gather_batch(x), gather_batch(y)
        return self.estimate(x, y, **self.options)

    def extra_repr(self) -> str:
        said = self.options | {"global_batch": self.global_batch}
        return ", ".join(f"{name}={value!r}" for name, value in said.items())


class HSICLoss(_Dependence):
    r"""$\mathrm{HSIC}_b(x, y) = \tfrac{1}{N^2}\,\mathrm{tr}(KHLH)$. The options are those of `hsic`.

    Args:
        global_batch: estimate over the samples of all ranks (`global_hsic`) instead of this rank's.

    Example:
        >>> penalty = HSICLoss(bandwidth="median", estimator="unbiased")
        >>> loss = cross_entropy + penalty(features, domain)
    """

    def __init__(
        self,
        *,
        sigma: Sigma = 5.0,
        bandwidth: Bandwidth = "reference",
        estimator: Estimator = "biased",
        normalizer: Normalizer = "n2",
        global_batch: bool = False,
    ):
        widths(sigma)
        check_choice("bandwidth", bandwidth, BANDWIDTHS)
        check_estimator(estimator, normalizer)
        options = {"sigma": sigma, "bandwidth": bandwidth, "estimator": estimator, "normalizer": normalizer}
        super().__init__(global_hsic if global_batch else hsic, options, global_batch)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Scalar, differentiable to x (N, …) and y (N, …)."""
        return self.estimate(x, y, **self.options)  # `global_hsic` gathers by itself, and less


class NHSICLoss(_Dependence):
    r"""$\mathrm{nHSIC}(x, y) = \mathrm{tr}(R_x R_y)$, $R = \bar K(\bar K + \epsilon N I)^{-1}$, as `nhsic` has it.

    Args:
        sigma, eps: those of `nhsic`.
        global_batch: estimate over the samples of all ranks.
    """

    def __init__(self, *, sigma: Sigma = 5.0, eps: float = 1e-5, global_batch: bool = False):
        widths(sigma)
        check_positive("eps", eps)
        super().__init__(nhsic, {"sigma": sigma, "eps": eps}, global_batch)


class CKALoss(_Dependence):
    r"""$\mathrm{CKA}(x, y) = \mathrm{HSIC}(x, y) / \sqrt{\mathrm{HSIC}(x, x)\,\mathrm{HSIC}(y, y)}$, as `cka` has it.

    Its negative makes representations alike, as a student's and a teacher's.

    Args:
        kernel, sigma, bandwidth, estimator: those of `cka`.
        global_batch: estimate over the samples of all ranks.

    Example:
        >>> loss = cross_entropy + (1 - CKALoss(kernel="linear")(student_features, teacher_features))
    """

    def __init__(
        self,
        *,
        kernel: Kernel = "rbf",
        sigma: Sigma = 5.0,
        bandwidth: Bandwidth = "reference",
        estimator: Estimator = "biased",
        global_batch: bool = False,
    ):
        check_choice("kernel", kernel, KERNELS)
        widths(sigma)
        check_choice("bandwidth", bandwidth, BANDWIDTHS)
        check_estimator(estimator)
        options = {"kernel": kernel, "sigma": sigma, "bandwidth": bandwidth, "estimator": estimator}
        super().__init__(cka, options, global_batch)


class RenyiMI(_Dependence):
    r"""$I_\alpha(x; y) = S_\alpha(A) + S_\alpha(B) - S_\alpha(A \circ B)$ in bits, as `renyi_mi` has it.

    Args:
        alpha, sigma, bandwidth: those of `renyi_mi`.
        global_batch: estimate over the samples of all ranks.
    """

    def __init__(
        self, *, alpha: float = 2.0, sigma: Sigma = 5.0, bandwidth: Bandwidth = "median", global_batch: bool = False
    ):
        check_positive("alpha", alpha)
        widths(sigma)
        check_choice("bandwidth", bandwidth, BANDWIDTHS)
        super().__init__(renyi_mi, {"alpha": alpha, "sigma": sigma, "bandwidth": bandwidth}, global_batch)


class MutualInformationPenalty(nn.Module):
    r"""MIMIR's regulariser $\lambda\, I(x, z)$ of images x and latents z (arXiv 2312.04960, Algorithm 1).

    Args:
        estimator: `hsic` (the paper), `nhsic` (the authors' code) or `renyi` (the paper's appendix F). λ does not carry
            over from one to another: their values differ by orders of magnitude.
        weight: λ ≥ 0. The paper's 1e-5 hardly moves anything: docs/which-estimator.md has measured shares.
        sigma: width of both kernels, > 0, or (σ of x, σ of z); not used by `median`.
        bandwidth: `reference`, `paper` or `median`; `nhsic` is defined with `reference` only. None takes the default of
            the estimator: `median` for `renyi`, `reference` elsewhere.
        alpha: order of `renyi`, > 0.
        global_batch: estimate over the samples of all ranks.

    Example:
        >>> penalty = MutualInformationPenalty(estimator="hsic", bandwidth="median", weight=1.0)
        >>> loss = reconstruction + penalty(adversarial_images, latents)
    """

    def __init__(
        self,
        *,
        estimator: Information = "hsic",
        weight: float = 1e-5,
        sigma: Sigma = 5.0,
        bandwidth: Bandwidth | None = None,
        alpha: float = 2.0,
        global_batch: bool = False,
    ):
        super().__init__()
        check_choice("estimator", estimator, get_args(Information))
        check_positive("alpha", alpha)
        check_not_negative("weight", weight)
        if estimator == "nhsic" and bandwidth not in (None, "reference"):
            raise ValueError(f"nhsic is defined with bandwidth='reference', got {bandwidth!r}: use that, or 'hsic'")
        self.estimator, self.weight = estimator, weight
        self.information: _Dependence
        if estimator == "nhsic":
            self.information = NHSICLoss(sigma=sigma, global_batch=global_batch)
        elif estimator == "hsic":
            self.information = HSICLoss(sigma=sigma, bandwidth=bandwidth or "reference", global_batch=global_batch)
        else:
            # Of the Rényi information only the median rule keeps off the ends of the scale: see ops/renyi_mi.py.
            self.information = RenyiMI(
                alpha=alpha, sigma=sigma, bandwidth=bandwidth or "median", global_batch=global_batch
            )

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """λ·I(x, z), a scalar differentiable to both; detach x (N, …) to train the encoder of z (N, …) only."""
        value: Tensor = self.information(x, z)
        return self.weight * value

    def extra_repr(self) -> str:
        return f"estimator={self.estimator!r}, weight={self.weight}"
