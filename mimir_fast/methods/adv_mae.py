"""Masked autoencoding of adversarial images: clean targets, perturbed inputs (MIMIR with λ = 0).

Shapes: B images, N patches, K kept, M masked, P numbers a patch.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from mimir_fast.attacks.reconstruction import ReconstructionAttackConfig, reconstruction_error
from mimir_fast.attacks.training_attack import attack_in_training
from mimir_fast.methods.mae import Mae, MaeConfig
from mimir_fast.methods.recorded import RecordedInputs
from mimir_fast.methods.registry import MethodEntry, register
from mimir_fast.methods.step import MaskedStep
from mimir_fast.models.masked_model import MaskedModel
from mimir_fast.ops.patches import every_patch, gather_patches
from mimir_fast.philox import Stream


@dataclass
class AdvMaeConfig(MaeConfig):
    """MAE's options and the perturbation."""

    free_to_change: ClassVar[frozenset[str]] = frozenset({"attack.cuda_graph"})
    attack: ReconstructionAttackConfig = field(default_factory=ReconstructionAttackConfig)


class AdvMae(Mae):
    """Reconstruct the clean masked patches from adversarial visible ones."""

    config: AdvMaeConfig

    def __init__(self, config: AdvMaeConfig) -> None:
        super().__init__(config)
        self.recorded = RecordedInputs(super().prepare)

    def prepare(self, step: MaskedStep) -> None:
        """Fill in the mask and the attacked patches, with `cuda_graph` by replaying a recording."""
        attack, number = self.config.attack, step.number
        replays = attack.cuda_graph and attack.attacks_in(number) and not attack.compares_in(number)
        (self.recorded if replays else super().prepare)(step)

    def perturb(self, step: MaskedStep) -> None:
        """Fill in the attacked patches: the visible ones, or all where masked ones matter too."""
        attack, images, mask = self.config.attack, step.batch.images, step.mask
        if attack.mask == "fresh":
            mask = step.draw_mask(self.config, Stream.ATTACK_MASK, self.token_order)

        def error(model: MaskedModel, patches: Tensor) -> Tensor:
            visible = patches if attack.visible_only else gather_patches(patches, mask.keep)
            target = patches if attack.target == "adversarial" else None
            norm_pix, kind = self.config.norm_pix_loss, self.config.pixel_loss
            return reconstruction_error(model, visible, images, *mask, norm_pix, target, kind)

        ids = mask.keep if attack.visible_only else every_patch(images, step.bare.patch_size)
        clean, start = step.noisy_patches(ids, attack.eps if attack.random_start else None)
        perturbed, step.log = attack_in_training(step.model, error, clean, start, attack, step.number)
        if attack.visible_only:
            step.visible = perturbed
        else:
            step.visible, step.whole = gather_patches(perturbed, step.mask.keep), perturbed


register(MethodEntry("adv_mae", "pretrain", AdvMaeConfig, AdvMae, "MAE on adversarial images"))
