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
from mimir_fast.attacks.training_attack import TrainingAttack
from mimir_fast.layers.borrowing import borrowed
from mimir_fast.models.masked_model import MaskedModel, View
from mimir_fast.ops.masked_loss import Kind, masked_loss
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


def reconstruction_error(
    model: MaskedModel, visible_BKP: Tensor, images_BCHW: Tensor, ids_keep_BK: Tensor, ids_masked_BM: Tensor,
    norm_pix: bool, target_BNP: Tensor | None = None, kind: Kind = "l2",
) -> Tensor:  # fmt: skip
    """Summed error, a scalar, of the masked patches that the model predicts from these visible ones.

    Args:
        images_BCHW: the clean images, uint8 or float in [0, 1]: what the masked patches should be.
        norm_pix: compare patches normalised one by one.
        target_BNP: patches to compare with in place of the images', through which the gradient flows too.
        kind: squared (`l2`) or absolute (`l1`) errors: the attack maximises what the training minimises.
    """
    prediction = model(View(visible_BKP, ids_keep_BK, ids_masked_BM)).prediction
    if target_BNP is None:
        return masked_loss(
            prediction, images_BCHW, ids_masked_BM, model.patch_size, norm_pix=norm_pix, kind=kind, reduction="sum"
        )
    target = gather_patches(target_BNP, ids_masked_BM)
    if norm_pix:
        target = normalize_patches(target)
    error = F.mse_loss if kind == "l2" else F.l1_loss
    return error(prediction.float(), target.float(), reduction="sum")


def attack_visible(
    model: nn.Module, images_BCHW: Tensor, visible_BKP: Tensor, start_BKP: Tensor, ids_keep_BK: Tensor,
    ids_masked_BM: Tensor, norm_pix: bool, threat: LinfThreat, kind: Kind = "l2",
) -> Tensor:  # fmt: skip
    """Adversarial visible patches (B, K, P) against the reconstruction of the clean masked ones.

    Args:
        visible_BKP: the clean visible patches, the centre of the ball.
        start_BKP: where the ascent starts, inside the ball.
        images_BCHW, norm_pix, kind: as for `reconstruction_error`.
    """
    with borrowed(model) as module:

        def error(patches_BKP: Tensor) -> Tensor:
            bare = cast(MaskedModel, module)
            return reconstruction_error(bare, patches_BKP, images_BCHW, ids_keep_BK, ids_masked_BM, norm_pix, kind=kind)

        return ascend(error, visible_BKP, start_BKP, threat)
