"""The mutual-information penalty λ·I(x + δ, z) between the adversarial image and the latent.

Which estimator, what enters it and over which batch are options, because the paper and the authors' code differ
(paper: biased HSIC; code: nHSIC) and λ does not carry over between them.
Shapes: B images, N patches, K kept, P numbers a patch, T = 1 + K tokens, D width.
"""

from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from mimir_fast.losses import MutualInformationPenalty
from mimir_fast.ops._precision import no_autocast
from mimir_fast.philox import Stream, uniform
from mimir_fast.validation import check_fields, check_number, without


@dataclass
class MutualInformationConfig:
    """The penalty λ·I(x + δ, z) of method `mimir`."""

    estimator: Literal["hsic", "nhsic", "renyi", "none"] = "hsic"
    """`hsic` (paper), `nhsic` (authors' code), `renyi` matrix-based Rényi entropy, or `none`."""
    weight: float = 1e-5
    """λ, the factor of the penalty."""
    share: float = 0.0
    """Hold the penalty's gradient at this share of the reconstruction's, both at the latent, by a λ that follows them
    (0.01 acts a little; 0.1 cost 8 to 20 points on Fashion-MNIST, nothing seen on CIFAR-10); 0 leaves λ at `weight`."""
    sigma: float = 5.0
    """Width of the RBF kernels; not used by the `median` rule."""
    bandwidth: Literal["auto", "reference", "paper", "median"] = "auto"
    """`reference` exp(-d²/(2σ²D)) (authors' code), `paper` exp(-d²/(2σ²)), `median` heuristic; `auto` takes the median
    for renyi, which saturates with the others, and `reference` elsewhere."""
    alpha: float = 2.0
    """Order of the Rényi entropy (2 has a closed form; the authors use 1.01)."""
    inputs: Literal["adversarial", "noisy", "clean", "visible"] = "adversarial"
    """Image side: whole `adversarial` image, whose masked patches are clean where the attack cannot move them; the same
    with the attack's random start in these (`noisy`: x + δ of the paper's Algorithm 1, where δ starts everywhere);
    whole `clean` image; or adversarial with masked patches zeroed (`visible`)."""
    tokens: Literal["sorted", "shuffled", "pooled"] = "sorted"
    """Latent side: visible tokens in raster order, in the order of the mask's draws (authors' code), or their mean."""
    pairing: Literal["own", "permuted"] = "own"
    """Each latent with its `own` image; or, as a placebo, with another of the batch by a random derangement in each
    step (`permuted`): a like pressure on the latent, without information about the image."""
    scope: Literal["rank", "global"] = "rank"
    """Estimate on each rank's batch (authors' code), or on the global batch across ranks."""
    accumulated: bool = False
    """Estimate on all micro-batches of a step together, for one encoder pass more: --accum_iter then changes memory and
    time only. Without, each micro-batch has an estimate of its own, and a penalty of another strength."""

    def __post_init__(self) -> None:
        check_fields(self, "mi.")
        check_number("mi.weight", self.weight, at_least=0)
        check_number("mi.share", self.share, at_least=0, at_most=1)
        check_number("mi.sigma", self.sigma, above=0)
        check_number("mi.alpha", self.alpha, above=0)
        if self.estimator == "nhsic" and self.bandwidth not in ("auto", "reference"):
            raise ValueError("estimator nhsic is defined with bandwidth=reference; choose that, or estimator=hsic")

    @property
    def acts(self) -> bool:
        """There is a penalty, and it has a weight."""
        return self.estimator != "none" and bool(self.weight or self.share)

    def idle(self) -> dict[str, str]:
        """Options that do nothing as the others are."""
        others = (f.name for f in fields(self) if f.name != "estimator")
        by_median = self.bandwidth == "median" or (self.bandwidth == "auto" and self.estimator == "renyi")
        return {
            **without(not by_median, "the kernels' width is the median", "sigma"),
            **without(not self.share, "--{}share sets the weight", "weight"),
            **without(self.estimator == "renyi", "--{}estimator is not renyi", "alpha"),
            **without(self.estimator != "none", "--{}estimator is none", *others),
        }


def derangement(samples_B: Tensor, *, seed: int, step: int | Tensor) -> Tensor:
    """(B,) int64 places, none its own where B ≥ 2: one random cycle through the batch, another in each step.

    Args:
        samples_B: (B,) int64 global sample indices.
    """
    order = uniform(seed, Stream.PAIRING, step, samples_B, 1)[:, 0].argsort(stable=True)
    return torch.empty_like(order).scatter_(0, order, order.roll(1))


def mutual_information(config: MutualInformationConfig, image: Tensor, latent_BTD: Tensor, num_prefix: int) -> Tensor:
    """The estimate before λ, a scalar in fp32 outside of autocast.

    Args:
        image: (B, …) what the config's `inputs` names, detached by the caller.
        latent_BTD: encoder output; gradients flow here.
        num_prefix: rows in front that are no patch's (1 with a cls token), which `pooled` leaves out.
    """
    with no_autocast(latent_BTD.device):
        z = latent_BTD.float()
        z = z[:, num_prefix:].mean(dim=1) if config.tokens == "pooled" else z
        if z.device.type == "cpu" and not bool(z.isfinite().all()):
            # The estimators refuse NaN. A training step wants it in its gradient, where it is skipped and counted.
            return z.sum() * torch.nan
        estimate = MutualInformationPenalty(
            estimator=config.estimator,  # type: ignore[arg-type]  # `none` does not come here
            weight=1.0,
            sigma=config.sigma,
            bandwidth=None if config.bandwidth == "auto" else config.bandwidth,
            alpha=config.alpha,
            global_batch=config.scope == "global",
        )
        return estimate(image.float(), z)
