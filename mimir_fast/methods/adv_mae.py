"""Masked autoencoding of adversarial images: clean targets, perturbed inputs (MIMIR with λ = 0).

Shapes: B images, N patches, K kept, M masked, P numbers a patch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mimir_fast.attacks.reconstruction import ReconstructionAttackConfig, attack_all, attack_visible
from mimir_fast.attacks.replay import Replay
from mimir_fast.attacks.training_attack import TrainingAttack, sign_agreement
from mimir_fast.data.batch import Batch
from mimir_fast.methods.mae import Draws, Mae, MaeConfig, Shown, masked_model
from mimir_fast.methods.masking import Mask
from mimir_fast.methods.noise import UniformNoise, start_of
from mimir_fast.methods.registry import MethodEntry, register
from mimir_fast.models.masked_model import MaskedModel
from mimir_fast.ops.bf16_kernels import weights_stay
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
        self._replays: dict[object, Replay] = {}

    def __call__(self, model: nn.Module, batch: Batch, *, seed: int, step: int) -> dict[str, Tensor]:
        """{"loss": scalar, …}; with `cuda_graph` all before the training's forward pass is replayed."""
        attack = self.config.attack
        if not attack.cuda_graph or not attack.attacks_in(step) or attack.compares_in(step):
            return super().__call__(model, batch, seed=seed, step=step)
        with weights_stay():
            return self.sum_up(self.reconstruct(model, batch, *self.replay(model, batch, seed, step)))

    def replay(self, model: nn.Module, batch: Batch, seed: int, step: int) -> tuple[Draws, Shown]:
        """The mask and the attacked input of a step, from the recorded graph."""

        def attack(images: Tensor, samples: Tensor, step: Tensor) -> tuple[Tensor, ...]:
            draws = self.draw(masked_model(model), Batch(images, samples, samples, samples), seed=seed, step=step)
            shown = self.perturb(model, images, draws)
            everywhere = () if shown.patches is None else (shown.patches,)
            return draws.mask.keep, draws.mask.masked, shown.visible, *everywhere

        device = batch.images.device
        inputs = batch.images, batch.samples, torch.full((), step, dtype=torch.int64, device=device)
        key = (
            id(model), seed, model.training, batch.images.shape, batch.images.dtype,
            torch.is_autocast_enabled(device.type),
        )  # fmt: skip
        if key not in self._replays:
            refuse_shards(model)
            self._replays[key] = Replay(attack, inputs)
        keep, masked, visible, *everywhere = self._replays[key](*inputs)
        return Draws(Mask(keep, masked)), Shown(visible, everywhere[0] if everywhere else None)

    def draw(self, model: MaskedModel, batch: Batch, *, seed: int, step: int | Tensor) -> Draws:
        """Mask, the attack's mask and its start."""
        attack, samples = self.config.attack, batch.samples
        mask = self.draw_mask(model, batch, Stream.MASK, seed=seed, step=step)
        attack_mask = mask
        if attack.mask == "fresh":
            attack_mask = self.draw_mask(model, batch, Stream.ATTACK_MASK, seed=seed, step=step)
        delta = UniformNoise(samples, seed, step, attack.eps) if attack.random_start else None
        return Draws(mask, attack_mask, delta, attack.attacks_in(step), attack.compares_in(step))

    def perturb(self, model: nn.Module, images: Tensor, draws: Draws) -> Shown:
        """The attacked images."""
        attack, p = self.config.attack, masked_model(model).patch_size
        mask = draws.attack_mask or draws.mask
        if attack.visible_only:
            clean, start = start_of(images, mask.keep, p, draws.delta)
            of_visible = partial(
                attack_visible, model, images, clean, start, mask.keep, mask.masked, self.config.norm_pix_loss
            )
            visible, notes = attacked(of_visible, attack, start, draws)
            return Shown(visible, None, notes)
        clean, start = start_of(images, every_patch(images, p), p, draws.delta)
        of_all = partial(
            attack_all, model, images, clean, start, mask.keep, mask.masked, self.config.norm_pix_loss, attack.target
        )
        patches, notes = attacked(of_all, attack, start, draws)
        return Shown(gather_patches(patches, draws.mask.keep), patches, notes)


def refuse_shards(model: nn.Module) -> None:
    """Raises ValueError for a model of FSDP2."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        raise ValueError(
            "attack.cuda_graph reads weights where they lay when it was recorded, but FSDP gathers them anew in each "
            "step: use --strategy ddp, or leave it out"
        )


def attacked(
    attack: Callable[[Any], Tensor], threat: TrainingAttack, start: Tensor, draws: Draws
) -> tuple[Tensor, dict[str, Tensor]]:
    """What the attack (threat → perturbed input) makes of its start in this step, and scalars to log of it."""
    if not draws.attacks:
        return start, {}
    notes = {"sign_agreement": sign_agreement(attack, threat, start.device)} if draws.compares else {}
    return attack(threat), notes


register(MethodEntry("adv_mae", "pretrain", AdvMaeConfig, AdvMae, "MAE on adversarial images"))
