"""One safetensors file of ours: all weights, decoder and adapters too, and the configuration."""

import json
import shlex
from pathlib import Path

import torch
from torch import Tensor

from mimir_fast.checkpoints.tensor_files import save_tensors
from mimir_fast.exporting.formats import Format, register
from mimir_fast.exporting.original import Original
from mimir_fast.models.identify import record_of
from mimir_fast.models.weight_files import read_weights
from mimir_fast.validation import counted
from mimir_fast.versions import python_command


def write(original: Original, path: Path) -> float:
    """Every tensor, bit for bit."""
    save_tensors(original.weights.tensors, path, header(original))
    check_same(original, read_weights(path).tensors)
    return 0.0


def header(original: Original) -> dict[str, str]:
    """What is known of the weights beside their tensors."""
    written = json.dumps(record_of(original.weights, original.architecture))
    return {"format": "mimir_fast", "config": written, **original.known_statistics}


def check_same(original: Original, back: dict[str, Tensor]) -> None:
    """Raises ValueError where a tensor was read back as another."""
    tensors = original.weights.tensors.items()
    changed = [n for n, t in tensors if n not in back or not torch.equal(t.nan_to_num(), back[n].nan_to_num())]
    if changed:
        others = counted(len(changed), "tensor is read back as another", "tensors are read back as others")
        raise ValueError(f"{others}: {', '.join(changed[:3])}")


def starts_from(original: Original, path: Path) -> list[str]:
    """The words of the command that takes it, after `python -m`."""
    words = ["finetune", "--init"] if original.num_classes is None else ["evaluate", "--checkpoint"]
    return [f"mimir_fast.{words[0]}", words[1], str(path)]


def use(original: Original, path: Path) -> str:
    """The commands that take it."""
    return shlex.join([python_command(), "-m", *starts_from(original, path)])


register(Format("safetensors", ".safetensors", write, use, keeps_all=True))
