"""A folder of torch.distributed.checkpoint: all weights, for torchtitan and whoever loads a model over many ranks.

`dcp.load` takes from it what the state dict that it is given names, so the decoder does not stand in an encoder's way.
"""

import json
import shlex
from pathlib import Path

from mimir_fast.checkpoints.dcp import read_dcp, write_dcp
from mimir_fast.checkpoints.durable import write_text
from mimir_fast.exporting.formats import Format, register, says
from mimir_fast.exporting.formats.safetensors import check_same, header, starts_from
from mimir_fast.exporting.original import Original
from mimir_fast.models.opening import ABOUT
from mimir_fast.versions import python_command


def write(original: Original, path: Path) -> float:
    """Every tensor, bit for bit, and beside them what is known of the model."""
    write_dcp(original.weights.tensors, path)
    write_text(path / ABOUT, json.dumps(header(original), indent=1) + "\n")
    check_same(original, read_dcp(path))
    return 0.0


def use(original: Original, path: Path) -> str:
    """In Python, and the command that takes it."""
    line = shlex.join([python_command(), "-m", *starts_from(original, path)])
    python = f"state = model.state_dict(); torch.distributed.checkpoint.load(state, checkpoint_id={str(path)!r})"
    return f"{python}\n     {line}"


def wrote(folder: Path) -> bool:
    """By what stands beside the tensors."""
    return says(folder / ABOUT, "format", "mimir_fast")


FILES = frozenset({".metadata", "__0_0.distcp", ABOUT})

register(Format("dcp", "", write, use, holds=FILES, wrote=wrote, keeps_all=True))
