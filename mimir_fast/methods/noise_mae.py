"""Masked autoencoding of noisy images: uniform noise of the attack's radius instead of the attack.

The control of every adversarial claim: what adversarial pre-training gains must be gained over this, at equal ε and
without the attack's cost. Clean targets.
"""

from dataclasses import dataclass

from mimir_fast.attacks.threat_model import check_radius
from mimir_fast.methods.mae import Mae, MaeConfig
from mimir_fast.methods.registry import MethodEntry, register
from mimir_fast.methods.step import MaskedStep


@dataclass
class NoiseMaeConfig(MaeConfig):
    """Options of MAE, and the size of the noise."""

    eps: float = 8 / 255
    """Largest absolute value of the noise, in units of images in [0, 1]: 8/255, not 8."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_radius("eps", self.eps)


class NoiseMae(Mae):
    """Reconstruct the clean masked patches from noisy visible ones."""

    config: NoiseMaeConfig
    change = "noisy"

    def perturb(self, step: MaskedStep) -> None:
        """Fill in the noisy visible patches."""
        step.visible = step.only_noisy_patches(step.mask.keep, self.config.eps)


register(MethodEntry("noise_mae", "pretrain", NoiseMaeConfig, NoiseMae, "MAE on noisy images, the attack's control"))
