"""A model whose state dict does not show its parts: `blocks.0…`, not `encoder.blocks.0…`.

So the files of a masked autoencoder and of a classifier have timm's and the MIMIR authors' names, theirs load strictly,
and one encoder serves both models. Names of different parts must not collide.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


class FlatNames(nn.Module):
    """Base of models whose parts (`flat_parts`: names of submodules) do not show in the state dict."""

    flat_parts: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(_flatten)
        self.register_load_state_dict_pre_hook(_unflatten)


def flat_name(model: nn.Module, name: str) -> str:
    """The name in files of the parameter or buffer `name` (from `named_parameters`)."""
    part, _, rest = name.partition(".")
    return rest if part in getattr(model, "flat_parts", ()) else name


def flat_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """`named_parameters` under the names that files have."""
    for name, parameter in model.named_parameters():
        yield flat_name(model, name), parameter


def _flatten(model: FlatNames, state: dict[str, Tensor], prefix: str, _metadata: dict[str, Any]) -> None:
    for name in [n for n in state if n.startswith(prefix)]:
        flat = prefix + flat_name(model, name.removeprefix(prefix))
        if flat != name:
            if flat in state:
                raise RuntimeError(f"two parts of {type(model).__name__} have a tensor named {flat!r}")
            state[flat] = state.pop(name)


def _unflatten(model: FlatNames, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for part in model.flat_parts:
        for name in getattr(model, part).state_dict():
            if prefix + name in state:
                state[f"{prefix}{part}.{name}"] = state.pop(prefix + name)
