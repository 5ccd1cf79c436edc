"""The attack of MIMIR's pre-training: make the masked patches hard to reconstruct from the visible ones.

A signed-gradient ascent on the reconstruction loss, in patch space (MIMIR, arXiv 2312.04960, Algorithm 1). Two axes, by
name, because the paper and the authors' code differ:

    mask     `shared`: the mask of the training step; only visible patches can matter, so only they are perturbed.
             `fresh`: a mask of the attack's own, as in the authors' code.
    target   `clean`: the clean image. `adversarial`: the perturbed image itself, through which the gradient also flows,
             so that masked patches move too (the authors' code).

The loss is summed, not averaged: only the sign of its gradient is used, and a mean over a large batch underflows in
half precision. Shapes: B images, N patches, K kept, M masked, P numbers a patch.
"""

from dataclasses import dataclass
from typing import Literal, cast

import torch.nn.functional as F
from torch import Tensor, nn

from mimir_fast.attacks.ascent import ascend
from mimir_fast.attacks.threat_model import LinfThreat
from mimir_fast.attacks.training_attack import TrainingAttack, precision_of
from mimir_fast.layers.borrowing import borrowed
from mimir_fast.models.masked_model import MaskedModel, View
from mimir_fast.ops.masked_loss import masked_loss
from mimir_fast.ops.patches import gather_patches, normalize_patches


@dataclass
class ReconstructionAttackConfig(TrainingAttack):
    """The perturbation of the pre-training images."""

    mask: Literal["shared", "fresh"] = "shared"
    """`shared` with the training step (paper) or a `fresh` one of the attack's own (authors' code)."""
    target: Literal["clean", "adversarial"] = "clean"
    """What the attacked loss compares with: the `clean` image (paper) or the `adversarial` one (authors' code)."""
    cuda_graph: bool = False
    """Record mask, noise and attack as one CUDA graph and replay it, for small batches on fast GPUs. Not with
    --strategy fsdp; on a CPU it changes nothing."""

    @property
    def visible_only(self) -> bool:
        """True when no patch outside the training mask's visible ones can matter."""
        return self.mask == "shared" and self.target == "clean"


def attack_visible(
    model: nn.Module, images_BCHW: Tensor, visible_BKP: Tensor, start_BKP: Tensor, ids_keep_BK: Tensor,
    ids_masked_BM: Tensor, norm_pix: bool, threat: LinfThreat,
) -> Tensor:  # fmt: skip
    """Adversarial visible patches (B, K, P), for a shared mask and a clean target.

    Args:
        images_BCHW: the clean images, uint8 or float in [0, 1]: what the masked patches should have been.
        visible_BKP: their visible patches.
        start_BKP: where the ascent starts, inside the ball.
        norm_pix: compare patches normalised one by one.
    """
    with borrowed(model) as module, precision_of(threat, start_BKP.device):
        p = cast(MaskedModel, module).patch_size

        def error(patches_BKP: Tensor) -> Tensor:
            prediction = module(View(patches_BKP, ids_keep_BK, ids_masked_BM)).prediction
            return masked_loss(prediction, images_BCHW, ids_masked_BM, p, norm_pix=norm_pix, reduction="sum")

        return ascend(error, visible_BKP, start_BKP, threat)


def attack_all(
    model: nn.Module, images_BCHW: Tensor, patches_BNP: Tensor, start_BNP: Tensor, ids_keep_BK: Tensor,
    ids_masked_BM: Tensor, norm_pix: bool, target: Literal["clean", "adversarial"], threat: LinfThreat,
) -> Tensor:  # fmt: skip
    """Adversarial patches (B, N, P) of the whole image; arguments as for `attack_visible`."""
    with borrowed(model) as module, precision_of(threat, start_BNP.device):
        p = cast(MaskedModel, module).patch_size

        def error(patches: Tensor) -> Tensor:
            prediction = module(View(gather_patches(patches, ids_keep_BK), ids_keep_BK, ids_masked_BM)).prediction
            if target == "clean":
                return masked_loss(prediction, images_BCHW, ids_masked_BM, p, norm_pix=norm_pix, reduction="sum")
            wanted = gather_patches(patches, ids_masked_BM)
            if norm_pix:
                wanted = normalize_patches(wanted)
            return F.mse_loss(prediction.float(), wanted.float(), reduction="sum")

        return ascend(error, patches_BNP, start_BNP, threat)
