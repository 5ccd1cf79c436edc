"""Can this model be evaluated? Checked once, before anything is measured.

Refused: a wrong number of classes, outputs that are no logits, probabilities. Noted: a model that is not deterministic.
Shapes: B images, C channels, H × W pixels, K classes.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

PROBABILITIES_HELP = (
    "the model returns probabilities, and attacks need logits: the softmax flattens the loss and hides gradients. "
    "Remove the softmax, or give --outputs probabilities to take their logarithm"
)


@dataclass
class Sanity:
    """What was found.

    Attributes:
        logits: (B, K), its first answer.
        deterministic: the same images gave the same logits twice.
        largest_difference: between the two answers, relative to the logits' norm.
    """

    logits: Tensor
    deterministic: bool
    largest_difference: float

    def note(self) -> str | None:
        """A sentence for the report where the model is not deterministic, else None."""
        if self.deterministic:
            return None
        return (
            f"The model is not deterministic: the same images gave logits that differ by {self.largest_difference:.1e} "
            "(relative). Attacks without averaging over its randomness overestimate the robustness; AutoAttack's "
            "version for such models is 'rand' (--autoattack_version rand)."
        )


def looks_like_probabilities(logits: Tensor, tolerance: float = 1e-5) -> bool:
    """True when all rows are non-negative and sum to 1 (AutoAttack's own test)."""
    rows = logits.double()
    return bool((rows >= -tolerance).all() and ((rows.sum(dim=-1) - 1).abs() < max(tolerance, 1e-4)).all())


def answer(model: nn.Module, images: Tensor) -> Any:
    """What the model returns for images (B, C, H, W); what it raises is a ValueError that says what to do."""
    try:
        return model(images)
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        if re.search("dtype|scalar type|BFloat16|Half", str(error)):
            raise ValueError(
                f"the model casts images to another type than its weights have, which are judged in float32 "
                f"({str(error).splitlines()[0]}): give the module inside its wrapper (Fabric's, Accelerate's)"
            ) from error
        raise ValueError(
            f"the model does not take images of shape {tuple(images.shape)}: {error}. Give it the size it was made for "
            "with --data.image_size and --data.channels"
        ) from error


@torch.no_grad()
def inspect_model(model: nn.Module, images: Tensor, num_classes: int, classes_of: str = "the data") -> Sanity:
    """Run the model twice on a few images.

    Args:
        images: (B, C, H, W) float in [0, 1].
        num_classes: of the data.
    Raises:
        ValueError: outputs are not (B, K), not finite, K is not `num_classes`, or they are probabilities.
    """
    first, second = answer(model, images), answer(model, images)
    if not isinstance(first, Tensor) or first.ndim != 2 or len(first) != len(images):
        shape = tuple(first.shape) if isinstance(first, Tensor) else type(first).__name__
        raise ValueError(
            f"the model returned {shape} for {len(images)} images, wanted logits (B, classes); a checkpoint without a "
            "head is no classifier: fine-tune it first (python -m mimir_fast.finetune --init …)"
        )
    if first.shape[1] != num_classes:
        raise ValueError(
            f"the model has {first.shape[1]} classes, {classes_of} has {num_classes}: choose the data it was trained "
            "on (--data.source), or the checkpoint that belongs to this data"
        )
    if not first.isfinite().all():
        raise ValueError("the model returns logits that are not finite (NaN or inf) on clean images: it is broken")
    if looks_like_probabilities(first):
        raise ValueError(PROBABILITIES_HELP)
    difference = float(((first - second).norm(dim=1) / (first.norm(dim=1) + 1e-10)).max())
    return Sanity(first, difference <= 1e-4, difference)
