"""FastAT: one step of 1.25 ε from a random start (Wong et al., arXiv 2001.03994, Algorithm 3).

A fifth of PGD-10's time, but it can fail all at once (catastrophic overfitting): watch the probe, methods/probe.py.
"""

from torch import Tensor, nn

from mimir_fast.attacks.pgd import fast_threat, pgd
from mimir_fast.methods.classification import ClassificationConfig, Inputs
from mimir_fast.methods.pgd import Pgd
from mimir_fast.methods.registry import MethodEntry, register
from mimir_fast.validation import without


class Fast(Pgd):
    """PGD training with FastAT's single step; of the configured attack only eps counts."""

    def adversary(self) -> str:
        """Its radius: one step of 1.25 times that is the rule."""
        return f"eps {255 * self.config.attack.eps:.3g}/255"

    def search(self, module: nn.Module, inputs: Inputs) -> Tensor:
        """Adversarial images (B, C, H, W) in [0, 1]."""
        threat = fast_threat(self.config.attack.eps)
        return pgd(
            module, inputs.images, inputs.targets, threat, samples=inputs.samples, seed=inputs.seed, step=inputs.step
        )


register(
    MethodEntry(
        "fast", "finetune", ClassificationConfig, Fast, "FastAT, one step",
        idle=without(
            False, "--method fast takes one step of 1.25 eps from a random start", "attack.alpha", "attack.num_steps",
            "attack.random_start",
        ),
    )
)  # fmt: skip
