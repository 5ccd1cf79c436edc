"""One safetensors file of ours: all weights, decoder and adapters too, and the configuration."""

import json
import shlex
from pathlib import Path

import torch

from mimir_fast.checkpoints.tensor_files import save_tensors
from mimir_fast.exporting.formats import Format, register
from mimir_fast.exporting.original import Original
from mimir_fast.models.identify import record_of
from mimir_fast.models.weight_files import read_weights
from mimir_fast.validation import counted
from mimir_fast.versions import python_command


def write(original: Original, path: Path) -> float:
    """Every tensor, bit for bit."""
    weights = original.weights
    written = json.dumps(record_of(weights, original.architecture))
    metadata = {"format": "mimir_fast", "config": written, **original.known_statistics}
    save_tensors(weights.tensors, path, metadata)
    back = read_weights(path).tensors
    changed = [
        n for n, t in weights.tensors.items() if n not in back or not torch.equal(t.nan_to_num(), back[n].nan_to_num())
    ]
    if changed:
        others = counted(len(changed), "tensor is read back as another", "tensors are read back as others")
        raise ValueError(f"{others}: {', '.join(changed[:3])}")
    return 0.0


def use(original: Original, path: Path) -> str:
    """The commands that take it."""
    words = ["finetune", "--init"] if original.num_classes is None else ["evaluate", "--checkpoint"]
    return shlex.join([python_command(), "-m", f"mimir_fast.{words[0]}", words[1], str(path)])


register(Format("safetensors", ".safetensors", write, use))
