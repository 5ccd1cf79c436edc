"""SimMIM (Xie et al., arXiv 2111.09886): mask tokens in a full-length encoder, a linear head, L1 on pixels.

Squares of 32 × 32 pixels are masked, 60 % of them. It is MAE with other options on a model with `decoder=linear`.
"""

from dataclasses import dataclass

from mimir_fast.methods.mae import Mae, MaeConfig
from mimir_fast.methods.registry import MethodEntry, register
from mimir_fast.ops.masked_loss import Kind


@dataclass
class SimmimConfig(MaeConfig):
    """Options of MAE with the defaults of SimMIM."""

    mask_ratio: float = 0.6
    """Fraction of the units that is masked."""
    norm_pix_loss: bool = False
    """Reconstruct patches normalised to zero mean and unit variance each."""
    mask_unit: int | None = 32
    """Side in pixels of what is masked as a whole, a multiple of the patch; None: the patch."""
    pixel_loss: Kind = "l1"
    """Error of the reconstruction: mean squared (MAE) or mean absolute (SimMIM)."""


register(MethodEntry("simmim", "pretrain", SimmimConfig, Mae, "SimMIM: full length, L1, linear head", decoder="linear"))
