"""What a picture of a frozen encoder is made of, and the registry of pictures.

A picture is one file in `pictures/`, which registers itself: it looks at images through the encoder, clean and
attacked, and gives numbers for results.json and a part of the report.
Shapes: N images, C channels, H × W pixels, P patches of an image.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mimir_fast.evaluation.charts import RAMP
from mimir_fast.evaluation.images import EvaluationImages
from mimir_fast.probing.encoder import FrozenEncoder
from mimir_fast.registry import Registry

Numbers = dict[str, Any]
"""What a picture found; JSON-able."""
SHOWN = 6
"""Images that pictures of single images show."""
PAIRS_AT_ONCE = 16
"""Images whose features of all layers are in memory together."""


@dataclass
class View:
    """What pictures look at.

    Attributes:
        encoder, name: the model, and what the user calls it.
        images: test images at equal distances.
        attacked: (N, C, H, W) float in [0, 1], `images` attacked; None without attack.
        attack: in words.
        more: further test images, for what needs many of them and no attack.
        against, against_name: another model, to compare with.
    """

    encoder: FrozenEncoder
    name: str
    images: EvaluationImages
    attacked: Tensor | None
    attack: str
    more: EvaluationImages
    device: torch.device
    against: FrozenEncoder | None = None
    against_name: str = ""

    @property
    def shown(self) -> tuple[EvaluationImages, Tensor, Tensor | None]:
        """The few images that are shown: themselves, their pixels in [0, 1], and the attacked ones."""
        index = torch.arange(min(SHOWN, len(self.images))) * len(self.images) // min(SHOWN, len(self.images))
        few = self.images.take(index)
        pixels = few.images.to(self.device).float() / 255
        return few, pixels, None if self.attacked is None else self.attacked[index].to(self.device)

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(clean, attacked) images of a batch; nothing without attack."""
        place = 0
        for images, _, _ in self.images.batches(PAIRS_AT_ONCE, self.device) if self.attacked is not None else ():
            assert self.attacked is not None
            yield images, self.attacked[place : place + len(images)].to(self.device)
            place += len(images)


@dataclass(frozen=True)
class Picture:
    """A part of the report.

    Attributes:
        name: key of its numbers in results.json ("pictures").
        title: heading.
        look: view → (numbers, HTML); None where it does not apply.
        compare: [(model's name, numbers)] → HTML of several models' numbers, "" for none.
        order: pictures are shown in ascending order.
    """

    name: str
    title: str
    look: Callable[[View], tuple[Numbers, str] | None]
    compare: Callable[[Sequence[tuple[str, Numbers]]], str] = lambda models: ""
    order: int = 1000


PICTURES: Registry[Picture] = Registry("picture", f"{__name__.rpartition('.')[0]}.pictures")


def all_pictures() -> list[Picture]:
    """Every picture, in the order of the report."""
    return sorted(PICTURES.all().values(), key=lambda picture: picture.order)


def grid_of(num_patches: int, height: int, width: int) -> tuple[int, int] | None:
    """Rows and columns of square patches that tile such an image; None where so many do not."""
    rows = round(math.sqrt(num_patches * height / width))
    columns = num_patches // max(rows, 1)
    return (rows, columns) if rows * columns == num_patches else None


def coloured(shares: Tensor) -> Tensor:
    """(3, rows, columns) in [0, 1]: the charts' colours of numbers (rows, columns) from 0 to 1."""
    ramp = torch.tensor([[int(colour[c : c + 2], 16) / 255 for c in (1, 3, 5)] for colour in RAMP])
    place = shares.cpu().float().clamp(0, 1) * (len(RAMP) - 1)
    index = place.long().clamp_max(len(RAMP) - 2)
    return torch.lerp(ramp[index], ramp[index + 1], (place - index)[..., None]).permute(2, 0, 1)


@dataclass(frozen=True)
class Mean:
    """A mean over images with its 95 % interval."""

    value: float
    half: float

    @classmethod
    def of(cls, values_N: Tensor) -> "Mean":
        """From one number an image."""
        values = values_N.double()
        half = 1.959964 * float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else 0.0
        return cls(float(values.mean()), half)

    @property
    def interval(self) -> tuple[float, float]:
        """(low, high)."""
        return self.value - self.half, self.value + self.half

    def as_dict(self) -> Numbers:
        """For results.json."""
        return {"mean": self.value, "interval": list(self.interval)}
