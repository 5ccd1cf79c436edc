"""One safetensors file of ours: all weights, decoder and adapters too, and the configuration."""

import json
from pathlib import Path

import torch

from mimir_fast.exporting.formats import Format, register
from mimir_fast.exporting.original import Original
from mimir_fast.models.weight_files import read_weights, written_config
from mimir_fast.versions import python_command


def write(original: Original, path: Path) -> float:
    """Every tensor, bit for bit."""
    from safetensors.torch import save_file

    weights = original.weights
    written = written_config(weights, original.architecture)
    metadata = {"format": "mimir_fast", "config": json.dumps(written), **original.known_statistics}
    save_file({name: t.contiguous() for name, t in weights.tensors.items()}, path, metadata=metadata)
    back = read_weights(path).tensors
    changed = [
        n for n, t in weights.tensors.items() if n not in back or not torch.equal(t.nan_to_num(), back[n].nan_to_num())
    ]
    if changed:
        raise ValueError(f"{len(changed)} tensors are read back as others: {', '.join(changed[:3])}")
    return 0.0


def use(original: Original, path: Path) -> str:
    """The commands that take it."""
    if original.num_classes is not None:
        return f"{python_command()} -m mimir_fast.evaluate --checkpoint {path}"
    return f"{python_command()} -m mimir_fast.finetune --init {path}"


register(Format("safetensors", ".safetensors", write, use))
