"""The layers of a model by name, and what comes out of them.

Layers are modules that are called, so forward hooks see their outputs, of ours and of anybody's models.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Of a model that is not ours, perhaps in a wrapper: those in timm's `feature_info`, else the longest list of
    modules, else none."""
    modules = dict(model.named_modules())
    for prefix, part in modules.items():
        known = getattr(part, "feature_info", None) or ()
        named = [f"{prefix}.{entry.get('module', '')}".lstrip(".") for entry in known if isinstance(entry, Mapping)]
        if found := {name: modules[name] for name in named if name in modules}:
            return found
    lists = [(name, part) for name, part in modules.items() if isinstance(part, (nn.ModuleList, nn.Sequential))]
    name, longest = max(lists, key=lambda item: len(item[1]), default=("", nn.ModuleList()))
    return {f"{name}.{index}": layer for index, layer in enumerate(longest)}


@contextmanager
def outputs_of(
    layers: Mapping[str, nn.Module], make: Callable[[Tensor], Tensor] = lambda output: output
) -> Iterator[dict[str, Tensor]]:
    """What `make` makes of each layer's last output (B, …), by name; forward passes inside of `with` fill it."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, (tuple, list)) else output
            if isinstance(first, Tensor):
                found[name] = make(first)

        return hook

    handles = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
