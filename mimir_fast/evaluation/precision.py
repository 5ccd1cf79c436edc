"""In which precision a model computes, seen while it computes: a wrapper may bring an autocast of its own.

Seen are the floating types of all results on the way, and at each of them whether the libraries may round the inputs of
fp32 products (TF32 on CUDA, bf16 in oneDNN). A tensor that is only cast to fewer digits counts when something is
computed from it: a model may answer in fp16 and compute in fp32. Shapes: B images, C channels, H × W pixels.
"""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Precision:
    """What was seen; prints as one line.

    Attributes:
        dtypes: of floating-point results.
        rounded: ways in which inputs of fp32 products may have been rounded, such as tf32.
    """

    dtypes: set[torch.dtype] = field(default_factory=set)
    rounded: set[str] = field(default_factory=set)

    @property
    def lower(self) -> list[str]:
        """What has fewer digits than fp32."""
        names = {str(dtype).removeprefix("torch.") for dtype in self.dtypes if dtype.itemsize < 4}
        return sorted(names | {f"{way} products" for way in self.rounded})

    def __str__(self) -> str:
        if not self.lower:
            return "fp32, no TF32, no autocast"
        return f"{' and '.join(self.lower)} inside the model, fp32 around it"

    def note(self) -> str | None:
        """What the reader must know; None where all is fp32."""
        if not self.lower:
            return None
        return (
            f"The model computes in {' and '.join(self.lower)}, though it is run in fp32: its wrapper or its code asks "
            "for it. Rounding hides small gradients, and robustness may be overestimated; give the module inside."
        )


class _Watch(TorchDispatchMode):
    """Looks at every result of every operation."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.seen, self.device = Precision(), device
        self.cast: dict[int, Tensor] = {}  # by their ids, which are theirs as long as they are held here

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        of_cast = [leaf for leaf in tree_leaves((args, kwargs)) if id(leaf) in self.cast]
        if func is torch.ops.aten._to_copy.default or (of_cast and func.is_view):
            self.cast |= {id(leaf): leaf for leaf in results if leaf.dtype.itemsize < 4}
            of_cast = [] if func.is_view else of_cast
            results = [leaf for leaf in results if id(leaf) not in self.cast]
        self.seen.dtypes |= {leaf.dtype for leaf in (*results, *of_cast)}
        self.seen.rounded |= allowed_roundings(self.device)
        return result


def allowed_roundings(device: torch.device) -> set[str]:
    """Ways in which fp32 products may be rounded on a device as things stand: tf32, bf16; empty where they may not."""
    backend: Any = torch.backends.cudnn if device.type == "cuda" else torch.backends.mkldnn
    products: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    return {products.matmul.fp32_precision, backend.conv.fp32_precision} & {"tf32", "bf16"}


@torch.no_grad()
def measured_precision(model: nn.Module, images: Tensor) -> Precision:
    """What the model computes with on a few images (B, C, H, W); what is compiled runs as it was written."""
    watch = _Watch(images.device)
    # Importing Dynamo takes a second; where nobody did, nothing is compiled.
    compiled = "torch._dynamo" in sys.modules
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext(), watch:
        model(images)
    return watch.seen
