"""One safetensors file of what timm's model of the family has, under its names; the Python that builds it is inside.

timm's models take normalised images: mean and deviation are in the metadata, and printed.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mimir_fast.checkpoints.tensor_files import save_tensors
from mimir_fast.exporting.compare import difference
from mimir_fast.exporting.formats import Format, register
from mimir_fast.exporting.original import Original
from mimir_fast.models.families import TimmModel, find_family


def write(original: Original, path: Path) -> float:
    """The tensors of encoder and head; read back by the class of timm that the code in the file names."""
    from safetensors.torch import load_file

    timm_model = in_timm(original)
    metadata = {"format": "pt", "timm": json.dumps(timm_model.arguments), "class": timm_model.path,
                "code": timm_model.code, "image_size": json.dumps(original.architecture.image_size),
                **original.known_statistics}  # fmt: skip
    save_tensors(timm_model.tensors, path, metadata)
    made: dict[str, Any] = {}
    exec(timm_model.code, made)  # the code that users are told to run
    theirs: Any = made["model"]
    theirs.load_state_dict(load_file(path))
    return difference(_function(theirs.eval(), original), original)


def in_timm(original: Original) -> TimmModel:
    """How timm builds it; raises ValueError where its class has no place for something."""
    architecture = original.architecture
    return find_family(architecture.family).to_timm(original.without_decoder, architecture)


def _function(model: nn.Module, original: Original) -> Any:
    mean, std = (torch.tensor(numbers).view(1, -1, 1, 1) for numbers in original.statistics)

    def run(images: Tensor) -> Tensor:
        images = (images - mean) / std
        if original.num_classes is not None:
            logits: Tensor = model(images)
            return logits
        features: Tensor = model.forward_features(images)  # type: ignore[operator]
        if features.ndim == 4:
            in_order = features if getattr(model, "output_fmt", "NCHW") == "NHWC" else features.permute(0, 2, 3, 1)
            return in_order.flatten(1, 2)
        return features

    return run


def use(original: Original, path: Path) -> str:
    """Building it, loading it, and what it takes."""
    mean, std = original.statistics
    return (
        f"\n{in_timm(original).code}\nmodel.load_state_dict(safetensors.torch.load_file({str(path)!r}))"
        f"\nimages in [0, 1], then mean {mean}, std {std}"
    )


register(Format("timm", ".safetensors", write, use, needs=("timm",), extra="train"))
