"""APGD-k adversarial training (Singh et al., arXiv 2303.01870): Auto-PGD of k steps in place of PGD.

No random start, first step 2ε, momentum 0.75, step sizes that halve at checkpoints, the model in eval mode, and of all
points the one of highest loss. With k = 2 or 3 it is the papers' choice for their best ImageNet models.
"""

from torch import Tensor, nn

from mimir_fast.attacks.apgd import apgd
from mimir_fast.methods.classification import ClassificationConfig, Inputs
from mimir_fast.methods.pgd import Pgd
from mimir_fast.methods.registry import MethodEntry, register
from mimir_fast.validation import without


class Apgd(Pgd):
    """PGD training with APGD's search; of the configured attack eps and num_steps count."""

    authors_mode = "eval"

    def adversary(self) -> str:
        """Its radius and number of steps; it chooses their sizes itself."""
        return f"eps {255 * self.config.attack.eps:.3g}/255, {self.config.attack.num_steps} steps"

    def start(self, inputs: Inputs) -> Tensor:
        """The images (B, C, H, W) themselves."""
        return inputs.images

    def search(self, module: nn.Module, inputs: Inputs) -> Tensor:
        """Adversarial images (B, C, H, W) in [0, 1]."""
        attack = self.config.attack
        return apgd(module, inputs.images, inputs.targets, attack.eps, attack.num_steps, keep="best_loss", mode="as_is")


register(
    MethodEntry(
        "apgd", "finetune", ClassificationConfig, Apgd, "APGD-k adversarial training",
        idle=without(
            False, "--method apgd starts at the image and chooses its steps", "attack.alpha", "attack.random_start",
            "attack.visible", "attack.whole_steps", "attack.ramp_steps",
        ),
    )
)  # fmt: skip
