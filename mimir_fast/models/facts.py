"""What a file of weights says about its model beside the tensors: heads, epsilon, normalisation and the like.

Shapes of tensors do not show these. A layout reader (models/layouts) takes them from what stands in the file or beside
it; what nobody says stays None, is assumed by whoever builds the model, and is printed as assumed.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

from mimir_fast.models.normalization import typed
from mimir_fast.sizes import Size, as_size


@dataclass(frozen=True)
class Facts:
    """Each field is None where the file does not say.

    Attributes:
        heads: attention heads of the encoder; of the first stage where it has stages.
        eps: added to the variance in the encoder's layer norms.
        gelu: the exact function (erf), or its approximation by tanh or a sigmoid (quick).
        mean, std: subtracted from and divided out of images in [0, 1], one number a channel.
        pool: what the head looks at, the mean of the patch tokens or the cls token.
        image_size: of the images it was trained on, in pixels.
        decoder_heads: attention heads of the decoder.
        norm_pixels: the decoder predicts patches of zero mean and unit variance.
        part: which of several encoders in the file this is, by the name it has there.
    """

    heads: int | None = None
    eps: float | None = None
    gelu: Literal["erf", "tanh", "quick"] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    pool: Literal["avg", "cls"] | None = None
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


def facts_of_args(args: Any) -> Facts:
    """From the options a training script saved: the MIMIR authors', MAE's and timm's names."""
    said = args if isinstance(args, dict) else vars(args) if hasattr(args, "__dict__") else {}
    size = said.get("input_size", said.get("img_size"))
    norm_pixels, pool = said.get("norm_pix_loss"), said.get("global_pool")
    return Facts(
        mean=numbers(said.get("mean")),
        std=numbers(said.get("std")),
        image_size=size_said(size),
        norm_pixels=norm_pixels if isinstance(norm_pixels, bool) else None,
        pool=None if not isinstance(pool, bool) else "avg" if pool else "cls",
    )


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
    """A list of finite numbers, or None for anything else."""
    fits = isinstance(value, (list, tuple)) and len(value) > 0
    if not fits or not all(isinstance(x, (int, float)) and math.isfinite(x) for x in value):
        return None
    return tuple(float(x) for x in value)
