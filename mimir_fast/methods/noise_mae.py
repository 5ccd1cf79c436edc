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
from mimir_fast.methods.registry import MethodEntry, register
from mimir_fast.models.masked_model import MaskedModel
from mimir_fast.ops.patches import patchify_gather
from mimir_fast.ops.random_uniform import random_uniform
from mimir_fast.philox import Stream


@dataclass
class NoiseMaeConfig(MaeConfig):
    """MAE's options and the noise."""

    eps: float = 8 / 255
    """Largest absolute value of the noise, in units of images in [0, 1]: 8/255, not 8."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_radius("eps", self.eps)


def uniform_delta(samples_B: Tensor, shape: tuple[int, int], eps: float, *, seed: int, step: int | Tensor) -> Tensor:
    """(B, *shape) uniform in [-eps, eps], a function of (seed, step, sample)."""
    noise = random_uniform(seed, Stream.ATTACK_START, step, samples_B, shape[0] * shape[1])
    return (2 * noise - 1).mul_(eps).view(len(samples_B), *shape)


class NoiseMae(Mae):
    """Reconstruct the clean masked patches from noisy visible ones."""

    config: NoiseMaeConfig

    def draw(self, model: MaskedModel, batch: Batch, *, seed: int, step: int | Tensor) -> Draws:
        """Mask and noise."""
        mask = self.draw_mask(model, batch, Stream.MASK, seed=seed, step=step)
        shape = (mask.keep.shape[1], model.encoder.patch_dim)
        return Draws(mask, delta=uniform_delta(batch.samples, shape, self.config.eps, seed=seed, step=step))

    def perturb(self, model: nn.Module, images: Tensor, draws: Draws, target_BMP: Tensor) -> Shown:
        """Noisy visible patches in [0, 1]."""
        assert draws.delta is not None, "noise_mae draws its noise"
        clean = patchify_gather(images, draws.mask.keep, masked_model(model).patch_size)
        return Shown((clean + draws.delta).clamp_(0, 1))


register(MethodEntry("noise_mae", "pretrain", NoiseMaeConfig, NoiseMae, "MAE on noisy images, the attack's control"))
