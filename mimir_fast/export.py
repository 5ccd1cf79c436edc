"""Take the weights out of a run: into timm, or into one safetensors file.

python -m mimir_fast.export runs/digits/mimir_vit_tiny --format timm --output encoder.safetensors
python -m mimir_fast.export runs/digits/pgd_vit_tiny --format safetensors --output robust.safetensors

`timm` holds what timm's VisionTransformer has, under its names: of a pre-training run the encoder, of a fine-tuned one
the whole classifier. The constructor's arguments are in the file's metadata and are printed. `safetensors` holds all
weights and the configuration; `--init` and `--checkpoint` of our commands take it.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from torch import Tensor

from mimir_fast.models.loading import infer_shape
from mimir_fast.models.masked_autoencoder import ENCODERS
from mimir_fast.models.normalization import NORMALIZATIONS
from mimir_fast.models.weight_files import Weights, WeightsChoice, read_weights
from mimir_fast.training.cli import exit_on_error, parse
from mimir_fast.versions import python_command

_ENCODER_PARTS = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.", "fc_norm.", "head.")


@dataclass
class ExportConfig:
    """Write a run's weights as one file."""

    source: Annotated[str, tyro.conf.Positional]
    """A run folder, a checkpoint folder, or any file --init takes."""
    output: str
    """The .safetensors file to write."""
    format: Literal["timm", "safetensors"] = "timm"
    """`timm`: for timm's VisionTransformer. `safetensors`: everything, for our own commands."""
    weights: WeightsChoice = "auto"
    """The trained weights (model), their moving average (ema), or the average where there is one (auto)."""
    overwrite: bool = False
    """Replace an existing file."""

    def __post_init__(self) -> None:
        if Path(self.output).suffix != ".safetensors":
            raise ValueError(f"--output {self.output}: wanted a name that ends in .safetensors")


def timm_arguments(weights: Weights) -> dict[str, Any]:
    """The arguments of timm.models.vision_transformer.VisionTransformer that fit the weights.

    Raises:
        WeightsError: not one of our encoders.
    """
    shape = infer_shape(weights)
    width, depth, num_heads = ENCODERS[shape.encoder]
    return {
        "img_size": shape.image_size,
        "patch_size": shape.patch_size,
        "in_chans": shape.channels,
        "embed_dim": width,
        "depth": depth,
        "num_heads": num_heads,
        "num_classes": shape.num_classes or 0,
        "global_pool": "avg" if "fc_norm.weight" in weights.tensors else "token",
    }


def timm_tensors(weights: Weights) -> dict[str, Tensor]:
    """The tensors timm's model has: no decoder, no mask token."""
    return {name: tensor for name, tensor in weights.tensors.items() if name.startswith(_ENCODER_PARTS)}


def export(config: ExportConfig) -> Path:
    """Write the file and return its path.

    Raises:
        WeightsError: the source cannot be read or is no vision transformer of ours.
        FileExistsError: the file exists and `overwrite` is off.
    """
    from safetensors.torch import save_file

    path = Path(config.output)
    if path.exists() and not config.overwrite:
        raise FileExistsError(f"{path} exists: choose another --output, or --overwrite")
    weights = read_weights(config.source, config.weights)
    saved = (weights.config or {}).get("model", {})
    mean, std = NORMALIZATIONS[saved.get("normalization", "none")]
    if config.format == "timm":
        arguments = timm_arguments(weights)
        tensors = timm_tensors(weights)
        metadata = {"format": "pt", "timm": json.dumps(arguments), "mean": json.dumps(mean), "std": json.dumps(std)}
        words = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        hint = f"timm.models.vision_transformer.VisionTransformer({words}).load_state_dict(load_file({str(path)!r}))"
        hint += f"\nimages in [0, 1], then mean {mean}, std {std}"
    else:
        tensors = weights.tensors
        metadata = {"format": "mimir_fast", "config": json.dumps(weights.config or {})}
        hint = f"{python_command()} -m mimir_fast.finetune --init {path}"
        if "head.weight" in tensors:
            hint = f"{python_command()} -m mimir_fast.evaluate --checkpoint {path}"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata=metadata)
    print(f"{weights.origin}\n  -> {path}: {len(tensors)} tensors, format {config.format}\nuse: {hint}")
    return path


def main() -> None:
    """The command."""
    export(parse(ExportConfig, sys.argv[1:], prog="python -m mimir_fast.export"))


if __name__ == "__main__":
    exit_on_error(main)
