"""Masked autoencoding of noisy images: uniform noise of the attack's radius in the place of the attack.

The control of every adversarial claim: what adversarial pre-training gains must be gained over this, at equal ε and
without the attack's cost. Clean targets.
Shapes: B images, K kept patches, P numbers a patch.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from mimir_fast.attacks.threat_model import check_radius
from mimir_fast.data.batch import Batch
from mimir_fast.methods.mae import Draws, Mae, MaeConfig, Shown, masked_model
from mimir_fast.methods.noise import UniformNoise, start_of
from mimir_fast.methods.registry import MethodEntry, register
from mimir_fast.models.masked_model import MaskedModel
from mimir_fast.philox import Stream


@dataclass
class NoiseMaeConfig(MaeConfig):
    """MAE's options and the noise."""

    eps: float = 8 / 255
    """Largest absolute value of the noise, in units of images in [0, 1]: 8/255, not 8."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_radius("eps", self.eps)


class NoiseMae(Mae):
    """Reconstruct the clean masked patches from noisy visible ones."""

    config: NoiseMaeConfig

    def draw(self, model: MaskedModel, batch: Batch, *, seed: int, step: int | Tensor) -> Draws:
        """Mask and noise."""
        mask = self.draw_mask(model, batch, Stream.MASK, seed=seed, step=step)
        return Draws(mask, delta=UniformNoise(batch.samples, seed, step, self.config.eps))

    def perturb(self, model: nn.Module, images: Tensor, draws: Draws) -> Shown:
        """Noisy visible patches in [0, 1]."""
        return Shown(start_of(images, draws.mask.keep, masked_model(model).patch_size, draws.delta)[1])


register(MethodEntry("noise_mae", "pretrain", NoiseMaeConfig, NoiseMae, "MAE on noisy images, the attack's control"))
