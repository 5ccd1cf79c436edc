"""What the exports to timm of several families have in common."""

from typing import Any

from torch import Tensor

from mimir_fast.models.families import Tensors
from mimir_fast.models.norms import is_adapter


def encoder_tensors(tensors: Tensors, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """Those whose names begin so, without the adapters for adversarial data."""
    return {name: t for name, t in tensors.items() if name.startswith(prefixes) and not is_adapter(name)}


def head_arguments(tensors: Tensors, title: str) -> dict[str, Any]:
    """timm's `num_classes` and `global_pool` of a model that pools the cls token, or that has no head.

    Raises:
        ValueError: the classifier has a norm after the mean token, which timm's class has not.
    """
    if "fc_norm.weight" in tensors:
        raise ValueError(
            f"this classifier has a norm after the mean of the tokens (fc_norm), timm's {title} has none: fine-tune "
            "with --model.global_pool cls to export it, or export with --format safetensors"
        )
    return {"num_classes": len(tensors["head.weight"]) if "head.weight" in tensors else 0, "global_pool": "token"}
