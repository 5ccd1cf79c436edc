"""Single-stage robust training, an experiment: adversarial masked autoencoding with a classifier on the same latent.

    loss = L( x[masked], decoder(z) ) + w·CE( head(z), y ),   z = f(x + δ) of the visible patches

Can pre-training and adversarial fine-tuning be one stage? MIMIR leaves it open (arXiv 2312.04960, §6). This is the
simplest answer to try, ours, with no published numbers: the attack is adv-MAE's (it maximises the reconstruction
error), the head reads the cls token (the mean token where a family has none), and sees a quarter of each image.
The checkpoint holds encoder, decoder and head, and can be evaluated or fine-tuned as a classifier as it is.
"""

from dataclasses import dataclass

from mimir_fast.attacks.pgd import cross_entropy
from mimir_fast.methods.adv_mae import AdvMae, AdvMaeConfig
from mimir_fast.methods.registry import MethodEntry, register
from mimir_fast.methods.step import Losses, MaskedStep
from mimir_fast.validation import check_number


@dataclass
class SingleStageConfig(AdvMaeConfig):
    """adv-MAE's options and the weight of the classifier."""

    class_weight: float = 1.0
    """Weight of the cross entropy; 1 is our choice."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("class_weight", self.class_weight, at_least=0)


class SingleStage(AdvMae):
    """Reconstruct and classify from adversarial visible patches."""

    config: SingleStageConfig

    def losses(self, step: MaskedStep) -> Losses:
        """Weighted terms: the reconstruction of masked patches, and the cross entropy of the labels."""
        if step.logits is None:
            raise ValueError(
                f"single_stage classifies, but this {type(step.bare).__name__} has no head: build it with num_classes"
            )
        loss = cross_entropy(step.logits, step.batch.labels).mean()
        return super().losses(step) | {"classification": (self.config.class_weight, loss)}


register(
    MethodEntry(
        "single_stage", "pretrain", SingleStageConfig, SingleStage,
        "experiment: adv-MAE and a classifier in one stage", labels=True,
    )
)  # fmt: skip
