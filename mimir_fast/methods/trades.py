"""TRADES (Zhang et al., arXiv 1901.08573, Eq. 3 and Algorithm 1): accuracy and stability as two terms.

    loss = CE(f(x), y) + β · (1/B) Σᵢ KL( f(xᵢ) ‖ f(x'ᵢ) )
    x'   = argmax over the ε-ball of KL( f(x) ‖ f(x') ),  searched from x + 0.001·N(0, 1)

As in the authors' code (github yaodongyu/TRADES), the attack sees the model in eval mode, each view goes through it by
itself, so that a batch norm normalises it by its own statistics, and the gradient of KL reaches both. The authors'
third forward pass, of x again, has the values of the first: left out, so running statistics count x once, not twice.
The start is Gaussian because at x' = x the gradient of KL is zero.
Shapes: B images, C channels, H × W pixels, K classes.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimir_fast.attacks.pgd import cross_entropy
from mimir_fast.methods.classification import (
    ClassificationConfig,
    ClassificationMethod,
    Inputs,
    accuracy,
    both_logits,
)
from mimir_fast.methods.registry import MethodEntry, register
from mimir_fast.philox import Stream, normal
from mimir_fast.validation import check_fields

START_STD = 0.001


@dataclass
class TradesConfig:
    """The loss of TRADES; it applies to method `trades` only."""

    beta: float = 6.0
    """Weight of stability against accuracy (1/λ in the paper)."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.beta < 0:
            raise ValueError(f"trades beta={self.beta}, wanted 0 or more; the paper uses 1 and 6")


@dataclass
class TradesObjective(ClassificationConfig):
    """Options of method `trades`."""

    trades: TradesConfig = field(default_factory=TradesConfig)


def gaussian_start(inputs: Inputs) -> Tensor:
    """(B, C, H, W): the images with noise of standard deviation 0.001, a function of (seed, step, sample)."""
    images = inputs.images
    noise = normal(inputs.seed, Stream.ATTACK_START, inputs.step, inputs.samples, images[0].numel())
    return (images + START_STD * noise.view_as(images)).clamp_(0, 1)


def kl_divergence(logits_BK: Tensor, probs_BK: Tensor) -> Tensor:
    """(B,) KL( p ‖ softmax(logits) ) in fp32; gradients flow into both."""
    return F.kl_div(F.log_softmax(logits_BK.float(), dim=1), probs_BK.float(), reduction="none").sum(dim=1)


def trades_loss(logits_BK: Tensor, logits_adv_BK: Tensor, targets: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """(natural cross entropy, β·mean KL); their sum is the loss."""
    robust = kl_divergence(logits_adv_BK, logits_BK.float().softmax(dim=1)).mean()
    return cross_entropy(logits_BK, targets).mean(), beta * robust


class Trades(ClassificationMethod):
    """Natural cross entropy and the divergence to the worst neighbour."""

    config: TradesObjective
    authors_mode = "eval"

    def __init__(self, config: TradesObjective) -> None:
        super().__init__(config)
        if not config.attack.random_start:
            raise ValueError(
                "trades starts beside the image, where its divergence has a gradient: leave random_start on"
            )

    def start(self, inputs: Inputs) -> Tensor:
        """(B, C, H, W): beside the images."""
        return gaussian_start(inputs)

    def search(self, module: nn.Module, inputs: Inputs) -> Tensor:
        """Adversarial images (B, C, H, W): the largest divergence found."""
        with torch.no_grad():
            probs = module(inputs.images).float().softmax(dim=1)
        return self.ascend(module, inputs, kl_divergence, probs)

    def losses(self, model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
        """{"loss", "natural_loss", "robust_loss" (with β), "accuracy"}, the accuracy on adversarial images."""
        logits, logits_adv = both_logits(model, inputs, self.perturb(model, inputs))
        natural, robust = trades_loss(logits, logits_adv, inputs.targets, self.config.trades.beta)
        return {
            "loss": natural + robust,
            "natural_loss": natural.detach(),
            "robust_loss": robust.detach(),
            "accuracy": accuracy(logits_adv, inputs.targets),
        }


register(MethodEntry("trades", "finetune", TradesObjective, Trades, "TRADES"))
