"""The encoder families: one a file, found by itself.

To add one, write a file in this folder that calls `register(Family(…))`; nothing else has to change.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor, nn

from mimir_fast.layers.norms import is_adapter
from mimir_fast.models.encoder import Encoder
from mimir_fast.models.options import differing, option_texts, parse_options
from mimir_fast.registry import Registry
from mimir_fast.sizes import Size
from mimir_fast.validation import nearest

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Architecture:
    """What is needed to build an encoder.

    Attributes:
        family: a registered name.
        size: one of the family's sizes.
        image_size, patch_size, channels: in pixels; `patch_size` is the stem's where a family has stages.
        options: what it can do beside the family's plain form, see Family; also `positions` of ConViT and XCiT.
    """

    family: str
    size: str
    image_size: Size
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
            f"import collections, functools, safetensors.torch, timm.layers, torch, {self.path.rpartition('.')[0]}",
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
        sized: the same of tensors and a known size of the images, or None when they do not fit; left out by a family
            that takes that size as it is said.
        rival: tensors that `recognise` takes without a size → another architecture of another size that has the same.
        to_timm: (tensors, architecture) → the same model in timm.
        from_timm: tensors under timm's names → under ours; tensors that have ours stay as they are.
        resize: (name, tensor, shape) → the tensor for another image size, or None when its shape must fit. Of a family
            with `sized`, old and new grid come behind where one of them is no square.
        image_size_in_tensors: `recognise` can tell the image size; where it cannot, a saved configuration can.
        size_of_window: that size is as wide as a window: it is the images' where a window of the last stage sees them.
        norm_before_pool: the classifier pools what the final norm made of the tokens, and has no norm after it.
        options: what it can do beside its plain form, name → default, see options.py.
        unseen: options that no tensor shows, so that `recognise` cannot tell them.
        fixed: eps and GELU of every model of the family, where they are no options: a file that says others is refused.
        settle: architecture with options → the one way to say the same; refuses what cannot be built.
        why_not: tensors that `recognise` refuses → by which of them, as "NAME, which …"; "" for unrelated ones.
        kept_on_a_grid: the authors' code takes the kept patches for a square grid: `--model.positions official`.
        position_table: positions are a table of parameters, `pos_embed`.
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
    sized: Callable[[Tensors, Size], Architecture | None] | None = None
    rival: Callable[[Tensors], Architecture | None] = lambda tensors: None
    from_timm: Callable[[Tensors], dict[str, Tensor]] = dict
    resize: Callable[..., Tensor | None] = lambda name, tensor, shape, *grids: None
    image_size_in_tensors: bool = True
    size_of_window: bool = False
    norm_before_pool: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    unseen: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=lambda: {"eps": 1e-6, "gelu": "erf"})
    settle: Callable[[Architecture], Architecture] = lambda architecture: architecture
    why_not: Callable[[Tensors], str] = lambda tensors: ""
    kept_on_a_grid: bool = False
    position_table: bool = True
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


def settled(architecture: Architecture) -> Architecture:
    """The one way to say this architecture: without options at their defaults, of the named size where there is one.

    Raises:
        ValueError: unknown family or size, or options that cannot be built.
    """
    family = find_family(architecture.family)
    check_size(family, architecture.size)
    beside = {name: value for name, value in architecture.options.items() if name not in family.options}
    options = differing(architecture.options, family.options)
    architecture = family.settle(replace(architecture, options=options))
    return replace(architecture, options=differing(architecture.options, family.options) | beside)


def architecture_of(
    family: str, size: str, image_size: Size, patch_size: int, channels: int, texts: Sequence[str]
) -> Architecture:
    """The architecture of a configuration.

    Args:
        texts: its options as they are typed.
    Raises:
        ValueError: unknown family, size or option, or options that cannot be built.
    """
    known = find_family(family)
    options = parse_options(texts, known.options, known.title)
    return settled(Architecture(family, size, image_size, patch_size, channels, options))


def informed(architecture: Architecture, known: Mapping[str, Any]) -> Architecture:
    """A recognised architecture with what its tensors could not show: the family's `unseen` options.

    Args:
        known: any facts by name; None is unknown, and what the family does not know is left out.
    """
    unseen = find_family(architecture.family).unseen
    more = {name: known[name] for name in unseen if known.get(name) is not None}
    return settled(replace(architecture, options={**architecture.options, **more})) if more else architecture


def describe(architecture: Architecture) -> str:
    """In words, such as `ViT-base (768 wide, 12 deep, 12 heads) with layer_scale registers=4`."""
    family = find_family(architecture.family)
    options = " ".join(option_texts(architecture.options))
    size = f"{family.title}-{architecture.size} ({family.sizes[architecture.size]})"
    return f"{size} with {options}" if options else size


def fields_of(architecture: Architecture) -> dict[str, Any]:
    """The fields of a ModelConfig or a ClassifierConfig that stand for it."""
    return {"family": architecture.family, "encoder": architecture.size, "patch_size": architecture.patch_size,
            "options": option_texts(architecture.options)}  # fmt: skip


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
    architecture = settled(architecture)
    encoder = find_family(architecture.family).build(architecture, final_norm)
    encoder.options = architecture.options
    return encoder


def recognise(tensors: Tensors, image_size: Size | None = None) -> Architecture | None:
    """The architecture whose tensors these are, or None.

    Args:
        image_size: of the images as far as somebody knows it. Tensors cannot tell 4 x 6 patches from 3 x 8, nor 2 x 8
            from 4 x 4: a size that does not fit them is passed over, and without one a square is believed in.
    """
    for family in all_families().values():
        if family.anchor in tensors and (found := _recognised(family, tensors, image_size)) is not None:
            return found
    return None if image_size is None else recognise(tensors)


def rival_of(tensors: Tensors) -> Architecture | None:
    """Another architecture that these tensors may be of where nobody knows the size of the images; or None."""
    for family in all_families().values():
        if family.anchor in tensors and _recognised(family, tensors) is not None:
            return family.rival(tensors)
    return None


def _recognised(family: Family, tensors: Tensors, size: Size | None = None) -> Architecture | None:
    """What the family says; None for tensors of other dimensions than it counts on, or some of them missing."""
    try:
        return family.recognise(tensors) if size is None or family.sized is None else family.sized(tensors, size)
    except (LookupError, ValueError):
        return None


def why_not(tensors: Tensors) -> str:
    """By which tensor a relative of a family is known not to be of it, "NAME, which …"; "" where none is."""
    for family in all_families().values():
        with suppress(LookupError, ValueError):  # as in `_recognised`
            if family.anchor in tensors and (reason := family.why_not(tensors)):
                return reason
    return ""


def under_our_names(tensors: Tensors) -> dict[str, Tensor]:
    """The tensors of a model of timm, or of ours, under our names; others as they are."""
    for family in all_families().values():
        if family.anchor in tensors and _recognised(family, renamed := family.from_timm(tensors)) is not None:
            return renamed
    return dict(tensors)


def encoder_tensors(tensors: Tensors, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """Those whose names begin so, without the adapters for adversarial data."""
    return {name: t for name, t in tensors.items() if name.startswith(prefixes) and not is_adapter(name)}


def head_arguments(tensors: Tensors, title: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """timm's `num_classes` and `global_pool` of a model whose norm comes before the pooling, or that has no head.

    Args:
        options: of the architecture, which tell the mean of the tokens (`norm_before_pool`) from the cls token.
    Raises:
        ValueError: the classifier has a norm after the mean token, which timm's class has not.
    """
    if "fc_norm.weight" in tensors:
        raise ValueError(
            f"this classifier has a norm after the mean of the tokens (fc_norm), timm's {title} has none: fine-tune "
            "with --model.global_pool cls to export it, or export with --format safetensors"
        )
    num_classes = len(tensors["head.weight"]) if "head.weight" in tensors else 0
    return {"num_classes": num_classes, "global_pool": "avg" if options.get("norm_before_pool") else "token"}
