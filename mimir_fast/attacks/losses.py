"""Losses of attacks beside cross entropy: margins of logits and of probabilities, and logits scaled against rounding.

    margin                max_{i≠y} z_i − z_y                     Carlini & Wagner, arXiv 1608.04644, f₆
    probability margin    max_{i≠y} p_i − p_y,  p = softmax(z)
    scaled cross entropy  CE(z / s, y),  s = z_π1 − z_π2, held constant in the gradient
    targeted margin       z_t − z_y

Cross entropy of a confident model is flat to the last bit of fp32: its gradient is the rounding's. Divided by the gap
of its two largest logits it is not, whatever the model's scale (Yu & Xu, "Efficient Loss Function by Minimizing the
Detrimental Effect of Floating-Point Errors on Gradient-Based Attacks", CVPR 2023; written after its idea, with one
fixed temperature).

Every loss takes logits (B, K) and labels (B,) int64, and returns (B,) fp32; an untargeted margin is above 0 exactly
where the image is misclassified. Shapes: B images, K classes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mimir_fast.attacks.pgd import Loss


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,) largest other logit less the true one."""
    return _others_less_true(logits.float(), labels)


def probability_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,) largest other probability less the true one, −1 … 1."""
    return _others_less_true(logits.float().softmax(dim=1), labels)


def scaled_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,) cross entropy of the logits over the gap of the two largest."""
    logits = logits.float()
    first, second = logits.detach().topk(2, dim=1).values.T
    return F.cross_entropy(logits / (first - second).clamp_min(1e-12)[:, None], labels, reduction="none")


def _others_less_true(values: Tensor, labels: Tensor) -> Tensor:
    true = values.gather(1, labels[:, None])[:, 0]
    return values.scatter(1, labels[:, None], -torch.inf).amax(dim=1) - true


def targeted_margin(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """(B,) logit of the target class (B,) less the true one."""
    logits = logits.float()
    return (logits.gather(1, targets[:, None]) - logits.gather(1, labels[:, None]))[:, 0]


@dataclass
class Aimed:
    """A loss with a target class for each image.

    Attributes:
        loss: (logits (B, K), labels (B,), targets (B,)) → (B,).
        targets: (B,) int64.
    """

    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    targets: Tensor

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(B,) of these logits (B, K)."""
        return self.loss(logits, labels, self.targets)


def loss_of_rows(loss: Loss, rows: Tensor) -> Loss:
    """The loss of some of the images it was made for: (B,) bool or positions."""
    return Aimed(loss.loss, loss.targets[rows]) if isinstance(loss, Aimed) else loss


def likeliest_wrong(logits: Tensor, labels: Tensor, count: int) -> Tensor:
    """(B, T) int64: the wrong classes of the largest logits (B, K), T = min(count, K − 1) of them, likeliest first.

    Every class that the model answers with is a target, whether or not an image of it is among those evaluated: whoever
    is taken for any other class is misclassified.
    """
    others = logits.float().scatter(1, labels[:, None], -torch.inf)
    return others.topk(min(count, logits.shape[1] - 1), dim=1).indices
