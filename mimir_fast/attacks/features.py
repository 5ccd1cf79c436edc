"""AEMIM's attack: make the encoder's features of the masked image differ from those of the clean one.

    maximise  dist( f(x + δ), f(x) ),   f: the latent of the visible patches, the clean side held fixed

No labels and no decoder: one encoder pass a step (AEMIM, arXiv 2407.11537, §3). At δ = 0 the distance is
zero and so is its gradient, so the ascent starts at random.
Shapes: B images, K visible patches, P numbers a patch, T latent tokens, D width.
"""

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from mimir_fast.attacks.training_attack import TrainingAttack
from mimir_fast.validation import check_choice, without


@dataclass
class FeatureAttackConfig(TrainingAttack):
    """The perturbation of AEMIM: ε 2/255 and 2 steps are the paper's, step size and start ours."""

    eps: float = 2 / 255
    """Radius of the ball, in units of images in [0, 1]: 2/255 in the paper."""
    alpha: float = 1.5 / 255
    """Step size; not published, 1.5/255 is ours: two steps reach any point of the ball."""
    num_steps: int = 2
    """Signed-gradient steps: 2 in the paper."""
    distance: Literal["l2", "kl"] = "l2"
    """Of features: `l2` squared Euclidean, or `kl` between softmaxes over the channels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("attack.distance", self.distance, ("l2", "kl"))
        if not self.random_start and self.num_steps:
            raise ValueError("the feature attack needs random_start: at the clean image the distance has no gradient")

    def idle(self) -> dict[str, str]:
        """Options that do nothing as the others are."""
        return super().idle() | without(self.num_steps, "--{}num_steps is 0", "distance")


def feature_distance(features_BTD: Tensor, clean_BTD: Tensor, distance: Literal["l2", "kl"]) -> Tensor:
    """(B,) fp32: Σ (f − f₀)², or Σ over tokens of KL( softmax f₀ ‖ softmax f )."""
    features, clean = features_BTD.float(), clean_BTD.float()
    if distance == "l2":
        return (features - clean).square().sum(dim=(1, 2))
    return F.kl_div(features.log_softmax(-1), clean.log_softmax(-1), reduction="none", log_target=True).sum(dim=(1, 2))
