"""FastAT: one step of 1.25 ε from a random start (Wong et al., arXiv 2001.03994, Algorithm 3).

A fifth of PGD-10's time, but it can fail all at once (catastrophic overfitting): watch the probe, methods/probe.py.
"""

from dataclasses import asdict, replace

from mimir_fast.attacks.pgd import fast_threat
from mimir_fast.methods.classification import ClassificationConfig
from mimir_fast.methods.pgd import Pgd
from mimir_fast.methods.registry import MethodEntry, register
from mimir_fast.validation import without


class Fast(Pgd):
    """PGD training with FastAT's single step; of the configured attack eps and every count."""

    def __init__(self, config: ClassificationConfig) -> None:
        super().__init__(config)
        self.attack = replace(config.attack, **asdict(fast_threat(config.attack.eps)))

    def adversary(self) -> str:
        """Its radius: one step of 1.25 times that is the rule."""
        return f"eps {255 * self.config.attack.eps:.3g}/255"


register(
    MethodEntry(
        "fast", "finetune", ClassificationConfig, Fast, "FastAT, one step",
        idle=without(
            False, "--method fast takes one step of 1.25 eps from a random start", "attack.alpha", "attack.num_steps",
            "attack.random_start", "attack.visible", "attack.whole_steps", "attack.ramp_steps",
        ),
    )
)  # fmt: skip
