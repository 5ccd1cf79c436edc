"""A TorchScript file, for programs in C++ too: images in [0, 1] to logits or tokens, for any number of images.

torch.jit.trace records it. torch calls TorchScript superseded by torch.export (`--format pt2`).
"""

import warnings
from pathlib import Path

import torch

from mimir_fast.exporting.compare import EXAMPLE, difference
from mimir_fast.exporting.formats import Format, program_use, register
from mimir_fast.exporting.original import Original


def write(original: Original, path: Path) -> float:
    """Read back by torch.jit.load."""
    with warnings.catch_warnings():
        # That it is superseded, and that sizes become constants: whether it matters is compared, at other batches.
        warnings.simplefilter("ignore")
        program = torch.jit.trace(original.model, original.images(EXAMPLE), check_trace=False)
        kinds = {node.kind() for node in program.inlined_graph.nodes()}
        foreign = {kind for kind in kinds if not kind.startswith(("aten::", "prim::"))}
        if foreign:
            raise ValueError(f"the model calls {', '.join(sorted(foreign))}, which its reader would have to install")
        program.save(str(path))
        read = torch.jit.load(str(path))
    return difference(read, original)


def use(original: Original, path: Path) -> str:
    """In Python, and in our evaluation."""
    return program_use(original, path, f"torch.jit.load({str(path)!r})(images)")


register(Format("torchscript", ".ts", write, use))
