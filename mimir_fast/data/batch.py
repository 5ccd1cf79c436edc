"""What a loader yields and everything downstream eats."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Batch:
    """One rank's share of a global batch.

    Attributes:
        images: (B, C, H, W) uint8 in [0, 255] (or float in [0, 1]); never normalised: attacks live in [0, 1].
        labels: (B,) int64; -1 where the source has no labels.
        samples: (B,) int64, the sample's index in its source. Masks and attack starts are functions of it.
        epochs: (B,) int64, which pass over the data the sample belongs to (a batch may straddle two).
    """

    images: Tensor
    labels: Tensor
    samples: Tensor
    epochs: Tensor

    def first(self, count: int) -> "Batch":
        """A batch of the first `count` samples; views, not copies."""
        return Batch(self.images[:count], self.labels[:count], self.samples[:count], self.epochs[:count])
