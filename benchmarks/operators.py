"""The operators of a step, seen through a dispatch mode on tensors without numbers.

The step runs on PyTorch's meta device, where tensors have shapes alone, in emulated bf16 autocast and with flash
attention. What reads a number on the host fails there.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from mimir_fast.data.batch import Batch
from mimir_fast.layers.kernels import KERNELS

META = torch.device("meta")
# Measured on an H200 (benchmarks.plan assumes the same).
FLOPS, BANDWIDTH = 790e12, 4.3e12
ALLOCATIONS = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "lift_fresh"}
# Beside products and attention: sums over samples, and what addresses memory by numbers.
ALONE = {"sum", "scatter_", "sort", "index_select", "gather"}
Key = tuple[int, int]
"""A storage and how often it had been written: a value."""


@dataclass
class Call:
    """One operator that computed.

    Attributes:
        reads, writes: value → bytes.
        level: products, attention and the like on the longest way to it.
    """

    name: str
    reads: dict[Key, int]
    writes: dict[Key, int]
    flops: int
    alone: bool
    level: int


@dataclass(frozen=True)
class Counts:
    """Totals of kernels."""

    launches: int
    bytes: int
    flops: int
    seconds: float

    def rounded(self) -> dict[str, float]:
        """As predictions.json holds them."""
        gigabytes, teraflop = round(self.bytes / 1e9, 1), round(self.flops / 1e12, 2)
        return {"launches": self.launches, "GB": gigabytes, "TFLOP": teraflop, "ms": round(1e3 * self.seconds, 1)}


class Autocast(TorchFunctionMode):
    """bf16 autocast for meta tensors, which have none: products in bf16, weights cast once, off in `no_autocast`."""

    PRODUCTS = frozenset({F.linear, F.conv2d, torch.matmul, torch.bmm, torch.baddbmm, Tensor.matmul, Tensor.__matmul__})

    def __init__(self) -> None:
        super().__init__()
        self._weights: dict[int, Tensor] = {}

    def _cast(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(torch.bfloat16)
        if id(value) not in self._weights:
            self._weights[id(value)] = value.to(torch.bfloat16)
        return self._weights[id(value)]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self.PRODUCTS and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(self._cast, (args, kwargs))
        return func(*args, **kwargs)


class Recorder(TorchDispatchMode):
    """The operators that compute, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.uploads = 0
        self._kept: list[Any] = []  # a freed storage's number would be given to another
        self._version: dict[int, int] = defaultdict(int)
        self._source: dict[Key, int] = {}

    def _values(self, tree: Any) -> dict[Key, int]:
        found = {}
        for t in tree_leaves(tree):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                found[storage._cdata, self._version[storage._cdata]] = min(t.numel() * t.itemsize, storage.nbytes())
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        reads = self._values((args, kwargs))
        out = func(*args, **kwargs)
        self._kept.append((args, kwargs, out))
        name = func._schema.name.split("::")[1]
        if any(isinstance(t, Tensor) and t.device.type == "cpu" and t.dim() for t in tree_leaves((args, kwargs))):
            self.uploads += func._overloadpacket is torch.ops.aten._to_copy
        results = self._values(out)
        changes = func._schema.is_mutable
        if name in ALLOCATIONS or not results or (not changes and results.keys() <= reads.keys()):
            return out
        if changes:
            for storage, _ in results:
                self._version[storage] += 1
            results = self._values(out)
        sources = [self.calls[self._source[key]] for key in reads if key in self._source]
        formula = flop_registry.get(func._overloadpacket)
        flops = int(formula(*args, **kwargs, out_val=out)) if formula else 0
        alone = bool(formula) or func.namespace != "aten" or name in ALONE
        level = max((call.level + call.alone for call in sources), default=0)
        for key in results:
            self._source[key] = len(self.calls)
        self.calls.append(Call(name, reads, results, flops, alone, level))
        return out

    def eager(self) -> Counts:
        """A kernel for each."""
        return total(self.calls)

    def fused(self) -> list[Call]:
        """Kernels after fusion: what reads an operator of its own level joins it, so no kernel waits for itself."""
        parent = list(range(len(self.calls)))

        def root(i: int) -> int:
            while parent[i] != i:
                parent[i] = i = parent[parent[i]]
            return i

        readers: dict[Key, set[int]] = defaultdict(set)
        for i, call in enumerate(self.calls):
            for key in call.reads:
                readers[key].add(i)
                source = self._source.get(key)
                if source is None or call.alone or self.calls[source].alone:
                    continue
                if self.calls[source].level == call.level:
                    parent[root(i)] = root(source)
        groups: dict[int, list[int]] = defaultdict(list)
        for i in range(len(self.calls)):
            groups[root(i)].append(i)
        kernels = []
        for members in groups.values():
            inside = set(members)
            made = {key: size for i in members for key, size in self.calls[i].writes.items()}
            wanted = {key: size for key, size in made.items() if not readers[key] or readers[key] - inside}
            read = {key: size for i in members for key, size in self.calls[i].reads.items() if key not in made}
            first = self.calls[members[0]]
            flops = sum(self.calls[i].flops for i in members)
            kernels.append(Call("+".join(self.calls[i].name for i in members), read, wanted, flops, first.alone, 0))
        return kernels


def total(kernels: Sequence[Call]) -> Counts:
    """Sums over kernels."""
    traffic = [sum(call.reads.values()) + sum(call.writes.values()) for call in kernels]
    seconds = sum(max(c.flops / FLOPS, b / BANDWIDTH) for c, b in zip(kernels, traffic, strict=True))
    return Counts(len(kernels), sum(traffic), sum(call.flops for call in kernels), seconds)


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention as one operator: on the meta device PyTorch's own choice would be made of products."""
    q, k, v = (t.transpose(1, 2).to(torch.bfloat16) for t in (q, k, v))
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    return out.transpose(1, 2)


def record(loss_of: Callable[[], Tensor]) -> Recorder:
    """Forward, attack and backward pass of a step."""
    with ExitStack() as stack:
        stack.enter_context(patch.dict(KERNELS, plain=flash, sdpa=flash))
        stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        recorder = stack.enter_context(Recorder())
        stack.enter_context(Autocast())
        loss_of().backward()
    return recorder


def meta_batch(images: int, side: int) -> Batch:
    """uint8 images without numbers."""
    numbers = torch.zeros(images, dtype=torch.int64, device=META)
    return Batch(torch.zeros(images, 3, side, side, dtype=torch.uint8, device=META), numbers, numbers, numbers)
