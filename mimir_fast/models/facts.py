"""What a file of weights says about its model beside the tensors: heads, epsilon, normalisation and the like.

Shapes of tensors do not show these. A layout reader (models/layouts) takes them from what stands in the file or beside
it; what nobody says stays None, is assumed by whoever builds the model, and is printed as assumed.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

import numpy as np

from mimir_fast.checkpoints.reading import WeightsError
from mimir_fast.models.normalization import typed
from mimir_fast.sizes import Size, as_size


@dataclass(frozen=True)
class Facts:
    """Each field is None where the file does not say.

    Attributes:
        heads: attention heads of the encoder; of the first stage where it has stages.
        eps: added to the variance in the encoder's layer norms.
        gelu: the exact function (erf), or its approximation by tanh or a sigmoid (quick); any other word is of a
            function that no encoder of ours has.
        mean, std: subtracted from and divided out of images in [0, 1], one number a channel.
        tokens_norm: the last norm of XCiT's class attention is of all tokens, not of the cls token alone.
        pool: what the head looks at, the mean of the patch tokens (avg) or the cls token (cls); any other word, such as
            timm's max, is of a pooling that no classifier of ours has.
        image_size: of the images it was trained on, in pixels.
        decoder_heads: attention heads of the decoder.
        norm_pixels: the decoder predicts patches of zero mean and unit variance.
        part: which of several encoders in the file this is, by the name it has there.
    """

    heads: int | None = None
    eps: float | None = None
    gelu: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    tokens_norm: bool | None = None
    pool: str | None = None
    image_size: Size | None = None
    decoder_heads: int | None = None
    norm_pixels: bool | None = None
    part: str | None = None

    def known(self) -> Iterator[tuple[str, Any]]:
        """(name, value) of what the file says."""
        return ((f.name, value) for f in fields(self) if (value := getattr(self, f.name)) is not None)

    def over(self, others: "Facts") -> Self:
        """These facts, and those of `others` where these say nothing."""
        return replace(self, **{name: value for name, value in others.known() if getattr(self, name) is None})


@dataclass(frozen=True)
class Asked:
    """What a user says of weights, by flags; it goes before what the file says.

    Attributes:
        options: what no tensor shows, as it is typed: heads=12, eps=1e-5, gelu=tanh.
        pool: what the head looks at; `auto` is as the file says.
        image_size: of the images they were trained on.
    """

    options: tuple[str, ...] = ()
    pool: Literal["auto", "avg", "cls"] = "auto"
    image_size: Size | None = None


def facts_of_file(beside: Mapping[str, Any]) -> Facts:
    """From what stands beside a state dict: numbers, tables of options, and JSON in the header of safetensors."""
    found = Facts()
    for table in tables(beside):
        found = found.over(facts_of_arguments(table)).over(facts_of_args(table))
    return found


def tables(beside: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """`beside` and the tables of options in it, the outer ones first, by name: Lightning's `hyper_parameters` with
    `model` and `data` inside, `normalization`, `transforms` and such; the last two may be lists of tables."""
    level = [dict(beside)]
    for _ in range(_DEPTH):
        yield from level
        level = [
            table
            for outer in level
            for name, value in outer.items()
            if isinstance(name, str) and _TABLES.fullmatch(name)
            for one in (value[:_MANY] if isinstance(value, (list, tuple)) else [value])
            if (table := _table(one, "normali" in name.lower()))
        ]


def _table(value: Any, of_statistics: bool) -> dict[str, Any]:
    """A dict, or the attributes of an object, with what is JSON in the header of a file read as such.

    Args:
        of_statistics: single numbers in it are of all channels.
    """
    found = {name: _parsed(inner) for name, inner in named(_parsed(value)).items()}
    return {n: [x] if of_statistics and isinstance(x, float) else x for n, x in found.items()}


def _parsed(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) and value[:1] in tuple('{["0123456789') else value
    except (ValueError, RecursionError):
        return value


_DEPTH, _MANY = 4, 100
# Words of the names of tables that tell of the model or its images; not those of decoders, heads, teachers, losses.
_WORD = (
    "(hyper|h?params|parameters|k?w?args|options|opts|config|cfg|data|datamodule|dataset|model|net|network|encoder|"
    "backbone|vit|images?|input|processor|preprocess(ing|or)?|train|val|eval|test|transforms?|normali[sz](ation|e)|"
    "stats|statistics|pretrained|default|meta|metadata|init)"
)
_TABLES = re.compile(f"{_WORD}(_{_WORD})*", re.IGNORECASE)
_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "nhead")
_SIZES = ("input_size", "img_size", "image_size")
# Of a mean, and of the deviation that belongs to it.
_PAIRS = [(f"{word}mean", f"{word}std") for word in ("", "image_", "img_", "pixel_", "norm_", "normalize_", "data_",
          "dataset_", "rgb_")]  # fmt: skip


def facts_of_args(args: Any) -> Facts:
    """From the options a training script saved: the MIMIR authors', MAE's and timm's names."""
    said = named(args)
    norm_pixels, sizes = said.get("norm_pix_loss"), (size_said(said.get(name)) for name in _SIZES)
    pairs = ((numbers(said.get(mean)), numbers(said.get(std))) for mean, std in _PAIRS)
    mean, std = next((pair for pair in pairs if None not in pair), (None, None))
    ours = Facts(
        heads=next((count for name in _COUNTS if (count := _count(said.get(name)))), None),
        mean=mean,
        std=std,
        image_size=next((size for size in sizes if size is not None), None),
        decoder_heads=_count(said.get("decoder_num_heads")),
        norm_pixels=norm_pixels if isinstance(norm_pixels, bool) else None,
        pool=pool_said(said.get("gp")) or pool_said(said.get("global_pool")),
    )
    return facts_of_arguments(said.get("model_kwargs")).over(ours)


def facts_of_arguments(arguments: Any) -> Facts:
    """From arguments of timm's classes and entry points, by name.

    Raises:
        WeightsError: one by which tensors of ours compute another function.
    """
    said, act = named(arguments), named(arguments).get("act_layer")
    if said.get("always_partition") is True:
        raise WeightsError("it says always_partition, and our Swin does not move the windows of its last stage")
    eps = re.search(r"\beps=(\d+(\.\d*)?(e[+-]?\d+)?)", str(said.get("norm_layer", "")))
    norm_eps, tokens_norm = said.get("norm_eps"), said.get("tokens_norm")
    return Facts(
        heads=_count(said.get("num_heads")),
        eps=float(eps[1]) if eps else norm_eps if isinstance(norm_eps, float) else None,
        gelu=GELUS.get(act, act) if isinstance(act, str) else None,
        tokens_norm=tokens_norm if isinstance(tokens_norm, bool) else None,
        pool="prefix" if said.get("pool_include_prefix") is True else pool_said(said.get("global_pool")),
        image_size=size_said(said.get("img_size")),
    )


GELUS = {"gelu": "erf", "gelu_tanh": "tanh", "quick_gelu": "quick"}
"""timm's names → ours."""


def named(values: Any) -> dict[str, Any]:
    """A dict, or the attributes of an object; {} for anything else."""
    return values if isinstance(values, dict) else dict(getattr(values, "__dict__", {}))


def pool_said(value: Any) -> str | None:
    """MAE's switch or timm's word, under our names."""
    if isinstance(value, bool):
        return "avg" if value else "cls"
    words = {"token": "cls", "fast": "avg", "fastavg": "avg"}
    return words.get(value, value) if isinstance(value, str) and value else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def in_unit_range(facts: Facts) -> tuple[Facts, str]:
    """Facts whose mean and std are of images in [0, 1], and a note where they were of grey levels up to 255."""
    mean, std = facts.mean, facts.std
    if mean is None or std is None or not (max(mean) > 1 or (not any(mean) and set(std) == {255.0})):
        return facts, ""
    scaled = replace(facts, mean=typed(m / 255 for m in mean), std=typed(s / 255 for s in std))
    return scaled, "mean and std are of grey levels in these weights: divided by 255, for images in [0, 1]"


def size_said(value: Any) -> Size | None:
    """The size that one number, height and width, or channels, height and width mean; None for anything else."""
    sides = list(value[-2:]) if isinstance(value, (list, tuple)) and value else [value]
    if not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides):
        return None
    return as_size((sides[0], sides[-1]))


def numbers(value: Any) -> tuple[float, ...] | None:
    """A list or array of finite numbers, or None for anything else."""
    value = value.tolist() if isinstance(value, np.ndarray) else value
    fits = isinstance(value, (list, tuple)) and len(value) > 0
    if not fits or not all(isinstance(x, (int, float)) and math.isfinite(x) for x in value):
        return None
    return tuple(float(x) for x in value)
