"""PGD-k adversarial training (Madry et al., arXiv 1706.06083, Eq. 2.1).

loss = CE(f(x + δ), y) with δ from k signed-gradient steps in the ε-ball. Other ways to find δ are subclasses.
"""

from torch import Tensor, nn

from mimir_fast.methods.classification import ClassificationConfig, ClassificationMethod, Inputs, plain_losses
from mimir_fast.methods.registry import MethodEntry, register


class Pgd(ClassificationMethod):
    """Cross entropy on the images an attack makes of the batch."""

    def losses(self, model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
        """{"loss", "accuracy"}, the accuracy on adversarial images."""
        return plain_losses(model, self.perturb(model, inputs), inputs)


register(MethodEntry("pgd", "finetune", ClassificationConfig, Pgd, "PGD-k adversarial training"))
