"""MART (Wang et al., ICLR 2020, Eq. 11): misclassified examples weigh more.

    loss = BCE(p', y) + β · (1/B) Σᵢ KL( p(xᵢ) ‖ p(x'ᵢ) ) · (1 − p(xᵢ)_y)
    BCE(p', y) = −log p'_y − log(1 − max_{k≠y} p'_k)           p' = softmax f(x'),  p = softmax f(x)

x' comes from PGD on the cross entropy, from x + 0.001·N(0, 1) as in the authors' code (from x without random_start). β
is 5 in the paper, 6 in their code (github YisenWang/MART), where, as here, the attack sees the model in eval mode and
each view goes through it by itself. "The true class" and "the strongest other class" have no meaning for mixed labels:
mixing is refused.
Shapes: B images, C channels, H × W pixels, K classes.
"""

from dataclasses import dataclass, field, replace

import torch.nn.functional as F
from torch import Tensor, nn

from mimir_fast.methods.classification import (
    ClassificationConfig,
    ClassificationMethod,
    Inputs,
    accuracy,
    both_logits,
)
from mimir_fast.methods.registry import MethodEntry, register
from mimir_fast.methods.trades import gaussian_start, kl_divergence
from mimir_fast.validation import check_fields

# The authors' constant: it bounds the margin's logarithm, and its gradient, where a wrong class has probability 1.
_CEILING = 1.0001


@dataclass
class MartConfig:
    """The loss of MART; it applies to method `mart` only."""

    beta: float = 5.0
    """Weight of the divergence; 5 in the paper, 6 in the authors' code."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.beta < 0:
            raise ValueError(f"mart beta={self.beta}, wanted 0 or more; the paper uses 5")


@dataclass
class MartObjective(ClassificationConfig):
    """Options of method `mart`."""

    mart: MartConfig = field(default_factory=MartConfig)


def mart_loss(logits_BK: Tensor, logits_adv_BK: Tensor, labels_B: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """(boosted cross entropy of the adversarial logits, β·weighted KL); their sum is the loss."""
    logits_BK, logits_adv_BK = logits_BK.float(), logits_adv_BK.float()
    probs, probs_adv = logits_BK.softmax(dim=1), logits_adv_BK.softmax(dim=1)
    strongest_other = probs_adv.scatter(1, labels_B[:, None], -1.0).amax(dim=1)
    boosted = F.cross_entropy(logits_adv_BK, labels_B) - (_CEILING - strongest_other).log().mean()
    wrongness = 1 - probs.gather(1, labels_B[:, None])[:, 0]
    return boosted, beta * (kl_divergence(logits_adv_BK, probs) * wrongness).mean()


class Mart(ClassificationMethod):
    """Boosted cross entropy, and a divergence that counts most where the clean image is misclassified."""

    config: MartObjective
    authors_mode = "eval"

    def __init__(self, config: MartObjective) -> None:
        super().__init__(config)
        if config.mixing.enabled or config.label_smoothing:
            raise ValueError(
                "mart needs hard labels: switch mixing and smoothing off "
                "(--mixing.mixup 0 --mixing.cutmix 0 --label_smoothing 0), or use another method"
            )

    def start(self, inputs: Inputs) -> Tensor:
        """(B, C, H, W): beside the images, or at them."""
        return gaussian_start(inputs) if self.attack.random_start else inputs.images

    def losses(self, model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
        """{"loss", "boosted_loss", "robust_loss" (with β), "accuracy"}, the accuracy on adversarial images."""
        logits, logits_adv = both_logits(model, inputs, self.perturb(model, inputs))
        boosted, robust = mart_loss(logits, logits_adv, inputs.targets, self.config.mart.beta)
        return {
            "loss": boosted + robust,
            "boosted_loss": boosted.detach(),
            "robust_loss": robust.detach(),
            "accuracy": accuracy(logits_adv, inputs.targets),
        }


def with_authors_beta(options: MartObjective) -> MartObjective:
    """β = 6, as in the authors' code, which the published numbers come from."""
    return replace(options, mart=replace(options.mart, beta=6.0))


register(MethodEntry("mart", "finetune", MartObjective, Mart, "MART", as_published=with_authors_beta))
