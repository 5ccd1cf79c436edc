"""ARD + PRM (Mo et al., "When Adversarial Training Meets Vision Transformers", NeurIPS 2022, arXiv 2210.07540).

Early in training the attack is weakened in two ways; one rate r, rising from 0 to 1 over the warm-up, governs both:

    ARD   attention random dropping: in the attack's backward pass the gradient flows through a residual branch
          (attention or MLP) with probability r only
    PRM   perturbation random masking: before each attack step the perturbation of a part 1 − r of the patches is
          erased

After the warm-up it is PGD training; or TRADES, or MART, whose attacks are held back in the same way in the authors'
code (github mo666666/When-Adversarial-Training-Meets-Vision-Transformers: β is 6 for both, and neither mixes images).
Their attacks see the model in eval mode, so they do here. Two points of ours: gates and masks belong to the sample (the
authors draw one for the batch), so they do not depend on the rank count; and r is constant within an epoch, at its
middle value.
Shapes: B images, C channels, H × W pixels, N patches, L layers, R branches.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimir_fast.attacks.pgd import Loss, linf_ascent
from mimir_fast.methods.classification import ClassificationMethod, Inputs, classifier
from mimir_fast.methods.mart import Mart, MartObjective, with_authors_beta
from mimir_fast.methods.pgd import Pgd
from mimir_fast.methods.registry import MethodEntry, register
from mimir_fast.methods.trades import Trades, TradesObjective
from mimir_fast.ops.random_uniform import random_uniform
from mimir_fast.philox import Stream
from mimir_fast.sizes import Size, area, height_width
from mimir_fast.validation import check_fields, without


@dataclass
class ArdPrmConfig:
    """The warm-up of ARD + PRM; it applies to method `ard_prm` only."""

    loss: Literal["pgd", "trades", "mart"] = "pgd"
    """What is trained and attacked: PGD training, TRADES or MART; with their starts and their weights, as in the
    authors' code."""
    warmup_epochs: float = 10.0
    """Epochs over which gradients and perturbations are let through more and more."""
    drop_gradients: bool = True
    """ARD: in the attack's backward pass, gradients skip residual branches at random."""
    mask_perturbation: bool = True
    """PRM: before each attack step, the perturbation of random patches is erased."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.warmup_epochs < 0:
            raise ValueError(f"ard_prm warmup_epochs={self.warmup_epochs}, wanted 0 or more; the paper uses 10")

    def idle(self) -> dict[str, str]:
        """Options that do nothing as the others are."""
        held_back = self.drop_gradients or self.mask_perturbation
        return without(held_back, "neither gradients nor perturbations are held back", "warmup_epochs")


@dataclass
class ArdPrmObjective(TradesObjective, MartObjective):
    """Options of method `ard_prm`, and of the losses that it works with."""

    ard_prm: ArdPrmConfig = field(default_factory=ArdPrmConfig)

    def idle(self) -> dict[str, str]:
        """Options that do nothing as the others are."""
        loss = self.ard_prm.loss
        return {
            **without(False, "--method ard_prm masks the perturbation", "attack.visible", "attack.whole_steps"),
            **without(loss == "trades", "--ard_prm.loss is not trades", "trades.beta"),
            **without(loss == "mart", "--ard_prm.loss is not mart", "mart.beta"),
        }


def pass_rate(epochs_B: Tensor, warmup_epochs: float) -> Tensor:
    """(B,) float32 in [0, 1]: r of each sample's epoch."""
    if warmup_epochs == 0:
        return torch.ones_like(epochs_B, dtype=torch.float32)
    return ((epochs_B.float() + 0.5) / warmup_epochs).clamp(max=1)


def draw_gates(rate_B: Tensor, inputs: Inputs, num_layers: int, num_branches: int, num_steps: int) -> Tensor:
    """(steps, B, L, R) bool: where the attack's gradients flow through the residual branches."""
    num = num_steps * num_layers * num_branches
    draws = random_uniform(inputs.seed, Stream.BRANCH_GATE, inputs.step, inputs.samples, num)
    return (draws < rate_B[:, None]).view(-1, num_steps, num_layers, num_branches).transpose(0, 1)


def draw_patch_masks(rate_B: Tensor, inputs: Inputs, grid: Size, num_steps: int) -> Tensor:
    """(steps, B, 1, rows, columns) float: 0 where the perturbation is erased, at int(N·(1 − r)) patches."""
    num_patches = area(grid)
    draws = random_uniform(inputs.seed, Stream.PATCH_GATE, inputs.step, inputs.samples, num_steps * num_patches)
    rank = draws.view(-1, num_steps, num_patches).argsort(dim=2, stable=True).argsort(dim=2, stable=True)
    num_erased = (num_patches * (1 - rate_B)).long().view(-1, 1, 1)
    return (rank >= num_erased).float().transpose(0, 1).unflatten(2, (1, *height_width(grid)))


class _HeldBack(ClassificationMethod):
    """A method whose attack is held back during the warm-up: that of the class behind this one in a list of bases."""

    config: ArdPrmObjective
    authors_mode = "eval"

    def ascend(self, module: nn.Module, inputs: Inputs, loss: Loss, labels: Tensor) -> Tensor:
        """Adversarial images (B, C, H, W) in [0, 1]."""
        threat = self.attack.in_training_step(inputs.step)
        images, own, bare = inputs.images, self.config.ard_prm, classifier(module)
        encoder = bare.encoder
        rate = pass_rate(inputs.epochs, own.warmup_epochs)
        gates = draw_gates(rate, inputs, bare.num_layers, encoder.num_branches, threat.num_steps)
        masks = draw_patch_masks(rate, inputs, encoder.grid, threat.num_steps)
        gate: Tensor | None = None

        def before_step(step: int, x: Tensor) -> Tensor:
            nonlocal gate
            gate = gates[step] if own.drop_gradients else None
            if not own.mask_perturbation:
                return x
            let_through = F.interpolate(masks[step], scale_factor=encoder.mask_unit, mode="nearest").bool()
            return torch.where(let_through, x, images)

        return linf_ascent(
            lambda x: loss(module(x, None, gate), labels), images, self.start(inputs), threat, before_step=before_step
        )


class ArdPrm(_HeldBack, Pgd):
    """PGD training, held back."""


class ArdPrmTrades(_HeldBack, Trades):
    """TRADES, held back."""

    config: ArdPrmObjective


class ArdPrmMart(_HeldBack, Mart):
    """MART, held back."""

    config: ArdPrmObjective


LOSSES: dict[str, type[_HeldBack]] = {"pgd": ArdPrm, "trades": ArdPrmTrades, "mart": ArdPrmMart}


def build(config: ArdPrmObjective) -> ClassificationMethod:
    """The method whose loss and search the options name, held back."""
    return LOSSES[config.ard_prm.loss](config)


register(MethodEntry("ard_prm", "finetune", ArdPrmObjective, build, "ARD + PRM", as_published=with_authors_beta))
