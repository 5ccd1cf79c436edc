"""Masked autoencoding of adversarial images: clean targets, perturbed inputs (MIMIR with λ = 0).

Shapes: B images, N patches, K kept, M masked, P numbers a patch.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mimir_fast.attacks.reconstruction import ReconstructionAttackConfig, attack_all, attack_visible
from mimir_fast.data.batch import Batch
from mimir_fast.methods.mae import MaeConfig, autoencoder, reconstruction_loss
from mimir_fast.methods.masking import Mask, draw_mask
from mimir_fast.models.masked_autoencoder import MaskedAutoencoder
from mimir_fast.ops.patches import gather_patches, masked_targets, patchify, patchify_gather
from mimir_fast.ops.random_masks import TokenOrder
from mimir_fast.ops.random_uniform import random_uniform
from mimir_fast.philox import Stream


@dataclass
class AdvMaeConfig(MaeConfig):
    """MAE's options and the perturbation."""

    attack: ReconstructionAttackConfig = field(default_factory=ReconstructionAttackConfig)


@dataclass
class Draws:
    """Everything random in one step."""

    mask: Mask
    """Of the training forward."""
    attack_mask: Mask
    """Of the attack; the same object as `mask` when it is shared."""
    delta: Tensor
    """Where the attack starts: (B, K, P) when only visible patches are attacked, else (B, N, P); in [-eps, eps]."""


@dataclass
class Adversarial:
    """The perturbed input of the training forward."""

    visible: Tensor
    """(B, K, P) adversarial visible patches: what the encoder sees."""
    patches: Tensor | None
    """(B, N, P) the whole adversarial image, where the attack went beyond the visible patches."""


class AdvMae:
    """Reconstruct the clean masked patches from adversarial visible ones."""

    token_order: TokenOrder = "sorted"

    def __init__(self, config: AdvMaeConfig) -> None:
        self.config = config

    def draw(self, model: MaskedAutoencoder, batch: Batch, *, seed: int, step: int) -> Draws:
        """All random numbers of the step, as functions of (seed, step, sample)."""
        attack, samples = self.config.attack, batch.samples
        num_patches, patch_dim = model.num_patches, model.patch_size**2 * model.in_chans

        def mask_of(stream: Stream) -> Mask:
            ratio = self.config.mask_ratio
            return draw_mask(
                samples, num_patches, ratio, seed=seed, step=step, stream=stream, order=self.token_order
            )  # fmt: skip

        mask = mask_of(Stream.MASK)
        attack_mask = mask if attack.mask == "shared" else mask_of(Stream.ATTACK_MASK)
        num_attacked = mask.keep.shape[1] if attack.visible_only else num_patches
        if attack.random_start:
            noise = random_uniform(seed, Stream.ATTACK_START, step, samples, num_attacked * patch_dim)
            delta = (2 * noise - 1).mul_(attack.eps).view(len(samples), num_attacked, patch_dim)
        else:
            delta = torch.zeros((), device=samples.device).expand(len(samples), num_attacked, patch_dim)
        return Draws(mask, attack_mask, delta)

    def perturb(self, model: nn.Module, images: Tensor, draws: Draws, target_BMP: Tensor) -> Adversarial:
        """Attack the images; `target_BMP` is the clean target at the training mask."""
        attack, p = self.config.attack, autoencoder(model).patch_size
        mask = draws.attack_mask
        if attack.visible_only:
            clean = patchify_gather(images, mask.keep, p)
            start = (clean + draws.delta).clamp_(0, 1)
            visible = attack_visible(model, clean, start, mask.keep, mask.masked, target_BMP, attack)
            return Adversarial(visible, None)
        clean = patchify(images, p)
        start = (clean + draws.delta).clamp_(0, 1)
        patches = attack_all(
            model, clean, start, mask.keep, mask.masked, attack.target, self.config.norm_pix_loss, attack
        )
        return Adversarial(gather_patches(patches, draws.mask.keep), patches)

    def losses(self, model: nn.Module, images: Tensor, draws: Draws) -> dict[str, Tensor]:
        """{"loss": …} of one step with the given draws."""
        target = masked_targets(
            images, draws.mask.masked, autoencoder(model).patch_size, norm_pix=self.config.norm_pix_loss
        )
        adversarial = self.perturb(model, images, draws, target)
        latent, prediction = model(adversarial.visible, draws.mask.keep, draws.mask.masked)
        reconstruction = reconstruction_loss(prediction, target)
        return self.combine(model, images, draws, adversarial, latent, reconstruction)

    def combine(
        self, model: nn.Module, images: Tensor, draws: Draws, adversarial: Adversarial, latent_BTD: Tensor,
        reconstruction: Tensor,
    ) -> dict[str, Tensor]:  # fmt: skip
        """The total from its parts; MIMIR adds its penalty here."""
        return {"loss": reconstruction}

    def __call__(self, model: nn.Module, batch: Batch, *, seed: int, step: int) -> dict[str, Tensor]:
        """{"loss": scalar, …}; `model` is a MaskedAutoencoder, possibly wrapped for data parallelism."""
        draws = self.draw(autoencoder(model), batch, seed=seed, step=step)
        return self.losses(model, batch.images, draws)
