"""Names of tensors in files: `blocks.0…`, where the live model has `encoder.blocks.0…`.

So the files of a masked autoencoder and of a classifier have timm's and the MIMIR authors' names, theirs load strictly,
and one encoder serves both models. A live model is PyTorch's: its state dict has the names of its parameters. Names are
converted where tensors go to a file or come from one.
"""

from collections.abc import Iterator, Mapping
from typing import TypeVar

from torch import nn

T = TypeVar("T")

DECODER = ("decoder_", "mask_token")
"""How the names of a decoder's tensors begin in files."""

# PEFT moves a layer's own weights into a `base_layer` and calls what it adds "default": in files they keep their names.
_PEFT = ((".base_layer.", "."), (".lora_A.default.", ".lora_A."), (".lora_B.default.", ".lora_B."))


class Parted(nn.Module):
    """A model of parts whose names do not show in files. Names of different parts must not collide.

    Attributes:
        file_parts: names of these submodules.
    """

    file_parts: tuple[str, ...] = ()


def file_name(model: nn.Module, name: str) -> str:
    """The name in files of the parameter or buffer `name`."""
    if not isinstance(model, Parted):
        return name
    part, _, rest = name.partition(".")
    name = rest if part in model.file_parts else name
    for theirs, ours in _PEFT:
        name = name.replace(theirs, ours)
    return name


def parameters_by_file_name(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """`named_parameters` under the names that files have."""
    for name, parameter in model.named_parameters():
        yield file_name(model, name), parameter


def to_files(model: nn.Module, tensors: Mapping[str, T]) -> dict[str, T]:
    """What is named as in the model's state dict (tensors, or anything else) under the names that files have.

    Raises:
        ValueError: two parts have a tensor of the same name.
    """
    renamed = {file_name(model, name): tensor for name, tensor in tensors.items()}
    if len(renamed) != len(tensors):
        raise ValueError(f"two parts of {type(model).__name__} have a tensor of the same name in files")
    return renamed


def from_files(model: nn.Module, tensors: Mapping[str, T]) -> dict[str, T]:
    """What is named as in files under the names of the model's state dict; unknown names stay as they are."""
    own = {file_name(model, name): name for name in model.state_dict()}
    return {own.get(name, name): tensor for name, tensor in tensors.items()}
