"""Training on clean images: the baseline without any robustness.

loss = CE(f(x), y).
"""

from torch import Tensor, nn

from mimir_fast.methods.classification import (
    OF_AN_ATTACK,
    ClassificationConfig,
    ClassificationMethod,
    Inputs,
    plain_losses,
)
from mimir_fast.methods.registry import MethodEntry, register
from mimir_fast.validation import without


class Natural(ClassificationMethod):
    """Cross entropy on clean images."""

    adversarial = False

    def adversary(self) -> str:
        """An empty string: it trains on clean images."""
        return ""

    def losses(self, model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
        """{"loss": mean cross entropy, "accuracy"}, both scalars, of clean images."""
        return plain_losses(model, inputs.images, inputs)


register(
    MethodEntry(
        "natural", "finetune", ClassificationConfig, Natural, "no adversary",
        idle=without(False, "--method natural attacks in the probe only", *OF_AN_ATTACK),
    )
)  # fmt: skip
