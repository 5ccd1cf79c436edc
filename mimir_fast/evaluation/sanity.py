"""Can this model be evaluated? Checked once, before anything is measured.

Refused: a wrong number of classes, outputs that are no logits, probabilities. Noted: a model that is not deterministic,
or that sees the other images of a batch.
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

TOLERANCE = 1e-4
"""Of relative differences between logits of batches of one size."""
OF_SIZES = 0.02
"""Of batches of other sizes: they take other kernels, which round differently, in half precision by a percent or so."""
LOOKS = 5
"""At half of the images: a model that tosses a coin answers alike now and then."""


@dataclass
class Sanity:
    """What was found.

    Attributes:
        logits: (B, K), its first answer.
        deterministic: the same images gave the same logits every time.
        largest_difference: between two answers to the same images, relative to the logits' norm.
        batch_difference: between the answers for some images beside others, beside the negatives of these, and alone; 0
            for one image, and for a model that is not deterministic.
    """

    logits: Tensor
    deterministic: bool
    largest_difference: float
    batch_difference: float = 0.0

    def notes(self) -> list[str]:
        """Sentences for the report: what is wrong with the model, empty where nothing is."""
        found = []
        if not self.deterministic:
            found.append(
                f"The model is not deterministic: the same images gave logits that differ by "
                f"{self.largest_difference:.1e} (relative). PGD averages its gradients over draws of the model "
                "(--eot); other attacks follow the gradient of one draw, and are weaker for it. AutoAttack's version "
                "for such models is 'rand' (--autoattack_version rand). Every attack judges an image by a fresh "
                "answer, so the worst case over several attacks falls by chance alone, even at ε = 0."
            )
        if self.batch_difference:
            found.append(
                "The model's answer for an image depends on the other images of its batch: beside others, or alone, "
                f"its logits differ by {self.batch_difference:.1e} (relative). No number here is of an image alone: it "
                "would be another with another --batch_size, and an attack on one image also moves the others. Is the "
                "model in train mode, or does it normalise over the batch?"
            )
        return found


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
def inspect_model(
    model: nn.Module, images: Tensor, num_classes: int | None = None, classes_of: str = "the data"
) -> Sanity:  # fmt: skip
    """Run the model twice on a few images, a few times on half of them, and once on these beside others.

    Args:
        images: (B, C, H, W) float in [0, 1].
        num_classes: of the data; None: as many as the model answers with.
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
    num_classes = first.shape[1] if num_classes is None else num_classes
    if num_classes < 2:
        raise ValueError(f"{classes_of} has {num_classes} class, so every answer is right: nothing can be evaluated")
    if first.shape[1] != num_classes:
        raise ValueError(
            f"the model has {first.shape[1]} classes, {classes_of} has {num_classes}: choose the data it was trained "
            "on (--data.source), or the checkpoint that belongs to this data"
        )
    if not first.isfinite().all():
        raise ValueError("the model returns logits that are not finite (NaN or inf) on clean images: it is broken")
    if looks_like_probabilities(first):
        raise ValueError(PROBABILITIES_HELP)
    half = max(1, len(images) // 2)
    alone, *again = [answer(model, images[:half]) for _ in range(LOOKS)]
    difference = max(relative_difference(first, second), *(relative_difference(alone, other) for other in again))
    beside = answer(model, torch.cat([images[:half], 1 - images[half:]]))[:half]
    in_batch = max(relative_difference(first[:half], beside), relative_difference(first[:half], alone, OF_SIZES))
    return Sanity(first, not difference, difference, 0.0 if difference else in_batch)


def relative_difference(first: Tensor, second: Tensor, tolerance: float = TOLERANCE) -> float:
    """The largest ‖a − b‖ / ‖a‖ of two answers (B, K) to the same images; 0 where it may be rounding."""
    relative = (first - second).norm(dim=1) / (first.norm(dim=1) + 1e-10)
    found = float(relative.nan_to_num(nan=1e30).clamp(max=1e30).max())
    return found if found > tolerance else 0.0
