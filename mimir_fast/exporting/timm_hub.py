"""config.json of a folder that `timm.create_model("hf-hub:…")` builds a classifier from, and transformers with timm.

timm builds a registered architecture with the arguments of `model_args`, and loads `model.safetensors` strictly. Files
of ours have timm's names, so nothing else is needed where timm's class has the same parameters.
transformers loads such a folder through its TimmWrapper.
"""

import json
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from mimir_fast.models.families import Architecture, TimmModel, find_family
from mimir_fast.models.normalization import Statistics
from mimir_fast.sizes import height_width

# timm builds names, not classes: any name of the class does, as the arguments that make a ViT are all given.
NAMES = {"timm.models.vision_transformer.VisionTransformer": "vit_base_patch16_224"}
CROPPED_FROM = 128
"""Images of this many pixels are cut out of larger ones, as ImageNet's are, where the run does not say."""


def timm_config(
    tensors: Mapping[str, Tensor], architecture: Architecture, statistics: Statistics | None, augment: str | None
) -> dict[str, Any]:
    """What timm reads of config.json; {} where it has no class for this model, or not by these names.

    Args:
        tensors: of the classifier's file.
        statistics: (mean, std) of the images; None for images in [0, 1] as they are.
        augment: how training cut its images, None where that is not known.
    """
    twin = _twin(tensors, architecture)
    if twin is None:
        return {}
    height, width = height_width(architecture.image_size)
    mean, std = statistics or ((0.0,) * architecture.channels, (1.0,) * architecture.channels)
    cropped = augment == "resized_crop" if augment is not None else min(height, width) >= CROPPED_FROM
    arguments = {name: value for name, value in twin.arguments.items() if name != "num_classes"}
    return {
        "architecture": NAMES[twin.path],
        "num_classes": twin.arguments["num_classes"],
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [architecture.channels, height, width], "fixed_input_size": True,
            "interpolation": "bicubic", "crop_pct": 224 / 256 if cropped else 1.0, "crop_mode": "center",
            "mean": list(mean), "std": list(std), "num_classes": twin.arguments["num_classes"],
            "pool_size": None, "first_conv": None, "classifier": "head",
        },
    }  # fmt: skip


def _twin(tensors: Mapping[str, Tensor], architecture: Architecture) -> TimmModel | None:
    try:
        twin = find_family(architecture.family).to_timm(dict(tensors), architecture)
    except ValueError:  # its class has no place for something
        return None
    if twin.path not in NAMES or twin.replaced or twin.tensors.keys() != tensors.keys():
        return None
    return twin if _is_json(twin.arguments.values()) else None


def _is_json(values: Collection[Any]) -> bool:
    """Whether JSON keeps them: not arguments that are Python code, a string of a class of its own."""
    try:
        json.dumps(list(values))
    except TypeError:
        return False
    return all(type(value) is str for value in values if isinstance(value, str))
