"""The encoder families: one a file, found by itself.

To add one, write a file in this folder that calls `register(Family(…))`; nothing else has to change.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mimir_fast.layers.norms import is_adapter
from mimir_fast.models.encoder import Encoder
from mimir_fast.registry import Registry
from mimir_fast.validation import nearest

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Architecture:
    """What is needed to build an encoder.

    Attributes:
        family: a registered name.
        size: one of the family's sizes.
        image_size, patch_size, channels: in pixels; `patch_size` is the stem's where a family has stages.
        options: what only this family knows, such as `positions` of ConViT.
    """

    family: str
    size: str
    image_size: int
    patch_size: int
    channels: int = 3
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TimmModel:
    """How timm builds the same model.

    Attributes:
        path: of the class.
        arguments: of its constructor.
        tensors: the state dict, under timm's names.
        replaced: submodules that no argument describes, as attributes of the model: Python that makes each.
    """

    path: str
    arguments: dict[str, Any]
    tensors: dict[str, Tensor]
    replaced: Mapping[str, str] = field(default_factory=dict)

    @property
    def code(self) -> str:
        """Python that leaves the model, without its weights, in `model`."""
        words = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        lines = [
            f"import collections, safetensors.torch, timm.layers, torch, {self.path.rpartition('.')[0]}",
            f"model = {self.path}({words})",
        ]
        return "\n".join(lines + [f"model.{name} = {made}" for name, made in self.replaced.items()])


@dataclass(frozen=True)
class Family:
    """One encoder family.

    Attributes:
        name: as it is typed.
        title: as it is printed.
        sizes: name → what it is, in words.
        anchor: a tensor that every checkpoint of the family has, by which it is found under any prefix.
        mask_unit: architecture → side in pixels of what is masked as a whole; refuses sizes that do not fit.
        build: (architecture, final_norm) → encoder. `final_norm`: with a norm after the last layer.
        build_decoder: (encoder, width, depth, heads) → decoder, see decoder.py.
        recognise: tensors → architecture, or None when they are of another family.
        to_timm: (tensors, architecture) → the same model in timm.
        from_timm: tensors under timm's names → under ours; tensors that have ours stay as they are.
        resize: (name, tensor, shape) → the tensor for another image size, or None when its shape must fit.
        image_size_in_tensors: `recognise` can tell the image size; where it cannot, a saved configuration can.
        norm_before_pool: the classifier pools what the final norm made of the tokens, and has no norm after it.
        pool: what a classifier pools where nobody says: `cls` where the authors (and timm) do, else `avg`.
    """

    name: str
    title: str
    sizes: Mapping[str, str]
    anchor: str
    mask_unit: Callable[[Architecture], int]
    build: Callable[[Architecture, bool], Encoder]
    build_decoder: Callable[[Encoder, int, int, int], nn.Module]
    recognise: Callable[[Tensors], Architecture | None]
    to_timm: Callable[[Tensors, Architecture], TimmModel]
    from_timm: Callable[[Tensors], dict[str, Tensor]] = dict
    resize: Callable[[str, Tensor, torch.Size], Tensor | None] = lambda name, tensor, shape: None
    image_size_in_tensors: bool = True
    norm_before_pool: bool = False
    pool: Literal["avg", "cls"] = "avg"


FAMILIES: Registry[Family] = Registry("encoder family", __name__)


def register(family: Family) -> None:
    """Add a family.

    Raises:
        ValueError: its name is taken.
    """
    FAMILIES.add(family.name, family)


def all_families() -> dict[str, Family]:
    """Every registered family, by name."""
    return FAMILIES.all()


def find_family(name: str) -> Family:
    """The family of that name.

    Raises:
        ValueError: there is none; the message suggests the nearest.
    """
    return FAMILIES.find(name)


def check_size(family: Family, size: str) -> None:
    """Raises ValueError, suggesting the nearest, when the family has no such size."""
    if size not in family.sizes:
        raise ValueError(
            f"unknown size of {family.title} {size!r}{nearest(size, family.sizes)} There are {', '.join(family.sizes)}"
        )


def mask_unit_of(architecture: Architecture) -> int:
    """Side in pixels of what an architecture masks as a whole.

    Raises:
        ValueError: unknown family, or sizes that do not fit.
    """
    return find_family(architecture.family).mask_unit(architecture)


def build_encoder(architecture: Architecture, *, final_norm: bool = True) -> Encoder:
    """The encoder, freshly initialised from torch's global generator.

    Raises:
        ValueError: unknown family or size, or an image that its patches, stages or windows do not divide.
    """
    family = find_family(architecture.family)
    check_size(family, architecture.size)
    return family.build(architecture, final_norm)


def recognise(tensors: Tensors) -> Architecture | None:
    """The architecture whose tensors these are, or None."""
    for family in all_families().values():
        if family.anchor in tensors and (found := family.recognise(tensors)) is not None:
            return found
    return None


def under_our_names(tensors: Tensors) -> dict[str, Tensor]:
    """The tensors of a model of timm, or of ours, under our names; others as they are."""
    for family in all_families().values():
        if family.anchor in tensors and family.recognise(renamed := family.from_timm(tensors)) is not None:
            return renamed
    return dict(tensors)


def encoder_tensors(tensors: Tensors, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """Those whose names begin so, without the adapters for adversarial data."""
    return {name: t for name, t in tensors.items() if name.startswith(prefixes) and not is_adapter(name)}


def head_arguments(tensors: Tensors, title: str) -> dict[str, Any]:
    """timm's `num_classes` and `global_pool` of a model that pools the cls token, or that has no head.

    Raises:
        ValueError: the classifier has a norm after the mean token, which timm's class has not.
    """
    if "fc_norm.weight" in tensors:
        raise ValueError(
            f"this classifier has a norm after the mean of the tokens (fc_norm), timm's {title} has none: fine-tune "
            "with --model.global_pool cls to export it, or export with --format safetensors"
        )
    return {"num_classes": len(tensors["head.weight"]) if "head.weight" in tensors else 0, "global_pool": "token"}
