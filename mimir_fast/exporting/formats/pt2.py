"""A torch.export program: images in [0, 1] to logits or tokens, for any number of images, without our package.

Its gradients are the original's, so that it can be attacked and trained on.
"""

import warnings
from pathlib import Path

import torch
from torch._ops import OpOverload

from mimir_fast.exporting.compare import EXAMPLE, difference
from mimir_fast.exporting.formats import Format, program_use, register
from mimir_fast.exporting.original import Original


def write(original: Original, path: Path) -> float:
    """Read back by torch.export.load."""
    program = recorded(original)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about torch's own packing of archives
        torch.export.save(program, path)
        read = torch.export.load(path).module()
    return difference(read, original)


def recorded(original: Original) -> torch.export.ExportedProgram:
    """The program, of PyTorch's own operations only.

    Raises:
        ValueError: the model calls operations that a reader without its package lacks.
    """
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(original.model, (original.images(EXAMPLE),), dynamic_shapes=({0: batch},))
    targets = {node.target for node in program.graph.nodes}
    foreign = {str(t) for t in targets if isinstance(t, OpOverload) and t.namespace not in ("aten", "prims")}
    if foreign:
        raise ValueError(f"the model calls {', '.join(sorted(foreign))}, which its reader would have to install")
    return program


def use(original: Original, path: Path) -> str:
    """In Python, and in our evaluation."""
    return program_use(original, path, f"torch.export.load({str(path)!r}).module()(images)")


register(Format("pt2", ".pt2", write, use))
