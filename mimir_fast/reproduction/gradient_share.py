"""The share of the mutual-information term: ‖λ·∇I‖ / ‖∇MSE‖ over the encoder's weights, on one batch.

A penalty whose gradient is a millionth of the reconstruction's cannot steer training, whatever it measures: below
1e-7 it does not even change the sum of the two gradients in fp32. The decoder is left out: the penalty does not reach
it.
"""

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from mimir_fast.data.batch import Batch
from mimir_fast.layers.borrowing import unwrap
from mimir_fast.methods.adv_mae import AdvMae
from mimir_fast.methods.mimir import Mimir, MimirConfig
from mimir_fast.methods.step import Losses, MaskedStep
from mimir_fast.models.masked_model import MaskedModel


class PenaltyAlone(Mimir):
    """MIMIR without its reconstruction term: loss = λ·I(x + δ, z), everything else as in training."""

    def losses(self, step: MaskedStep) -> Losses:
        """The penalty; the prediction stays in the graph with weight 0."""
        return {name: (weight if name == "mi" else 0.0, v) for name, (weight, v) in super().losses(step).items()}


def gradient_share(config: MimirConfig, model: nn.Module, batch: Batch, *, seed: int = 0, step: int = 0) -> float:
    """‖λ·∇I‖ / ‖∇MSE‖ for `mimir` with this configuration; the model's gradients are left alone.

    Args:
        model: a MaskedModel on the batch's device.
        batch: the size matters: the estimators compare the samples of a batch with each other.
    Raises:
        ValueError: the configuration has no penalty, or holds its share, and has no λ to compare with.
    """
    if config.mi.estimator == "none" or config.mi.share:
        raise ValueError("no penalty of a fixed weight (estimator=none, or mi.share), so no gradient to compare")
    # Computed at λ = 1 and scaled afterwards, so that a tiny λ cannot underflow.
    unit = replace(config, mi=replace(config.mi, weight=1.0, share=0.0))
    penalty = _encoder_gradient(PenaltyAlone(unit), model, batch, seed, step)
    reconstruction = _encoder_gradient(AdvMae(config), model, batch, seed, step)
    return config.mi.weight * float(penalty.norm() / reconstruction.norm())


def _encoder_gradient(method: AdvMae, model: nn.Module, batch: Batch, seed: int, step: int) -> Tensor:
    encoder = cast(MaskedModel, unwrap(model)).encoder
    parameters = [p for p in encoder.parameters() if p.requires_grad]
    loss = method(model, batch, seed=seed, step=step)["loss"]
    gradients = torch.autograd.grad(loss, parameters)
    return torch.cat([gradient.flatten().double() for gradient in gradients])
