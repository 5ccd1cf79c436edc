"""Normalisation: the mean and deviation that a model takes out of images in [0, 1], inside of itself.

So an attack's ε is of pixels, whatever the model was trained on. A configuration says it by a name or by numbers, every
file by numbers (`mean` and `std` in its metadata, as JSON).

Shapes: B images, C channels, H × W pixels, K patches, P = p·p·C numbers a patch, channels last.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""(mean, std) of images in [0, 1], one number a channel each."""

NormalizationName = Literal["none", "half", "imagenet"]

# name: (mean, std). `none` is how our pre-training and the authors' feed the encoder.
NORMALIZATIONS: dict[NormalizationName, Statistics] = {
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


class Normalizer(nn.Module):
    """(x − mean) / std; hands on what it is given where that changes nothing.

    Attributes:
        statistics: (mean, std).
        mean, std: (1, C, 1, 1) buffers, not persistent: a state dict holds the authors' names and nothing else.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, statistics: Statistics) -> None:
        super().__init__()
        self.statistics, self.changes = statistics, not is_none(statistics)
        for name, values in zip(("mean", "std"), statistics, strict=True):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W), or patches (B, K, P) in (row, column, channel) order, of the same shape."""
        if not self.changes:
            return x
        if x.ndim == 4:
            return (x - self.mean) / self.std
        channels = len(self.statistics[0])
        return ((x.unflatten(-1, (-1, channels)) - self.mean.view(channels)) / self.std.view(channels)).flatten(-2)


def chosen(config: Any, channels: int) -> Statistics:
    """(mean, std) of a configuration with `normalization`, `mean` and `std`, of which the numbers go first.

    Raises:
        ValueError: not one number a channel.
    """
    if config.mean is not None and config.std is not None:
        check_statistics(config.mean, config.std, channels, "--model.")
        return tuple(config.mean), tuple(config.std)
    mean, std = NORMALIZATIONS[config.normalization]
    if channels > len(mean):
        if config.normalization != "none":
            raise ValueError(
                f"normalization={config.normalization} is of {len(mean)} channels, the images have {channels}: give "
                "--model.mean and --model.std, one number a channel"
            )
        return none_of(channels)
    return mean[:channels], std[:channels]


def check_choice(config: Any) -> None:
    """Raises ValueError for an unknown name, or for numbers that are no statistics of images."""
    if config.normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization={config.normalization!r}, wanted one of {', '.join(NORMALIZATIONS)}")
    check_statistics(config.mean, config.std, None, "--model.")


def check_statistics(
    mean: tuple[float, ...] | None, std: tuple[float, ...] | None, channels: int | None, prefix: str = "--"
) -> None:
    """Raises ValueError where a mean and a deviation do not go together, or are of images in [0, 255].

    Args:
        channels: how many numbers each must have; None: as many as the other.
        prefix: of the flags, for the message.
    """
    names = f"{prefix}mean and {prefix}std"
    if mean is None and std is None:
        return
    if mean is None or std is None:
        raise ValueError(f"give {names} together, one number a channel each")
    count = channels or len(mean)
    if not len(mean) == len(std) == count or count == 0:
        raise ValueError(f"{names} have {len(mean)} and {len(std)} numbers: wanted {count or 'some'}, one a channel")
    if not min(std) > 0:
        raise ValueError(f"{prefix}std {_numbers(std)}: wanted deviations above 0")
    if not (min(mean) >= 0 and max(mean) <= 1):
        raise ValueError(
            f"{prefix}mean {_numbers(mean)}: wanted the mean of images in [0, 1]; that of grey levels is divided by "
            f"255, such as {prefix}mean 125/255 …, and its deviation too"
        )


def typed(values: Iterable[float]) -> tuple[float, ...]:
    """The numbers that somebody typed: 0.485 for what fp32 or a division by 255 made of it."""
    return tuple(float(f"{value:.7g}") for value in values)


def pair(mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> Statistics | None:
    """(mean, std) of two options that belong together; None where they are left out."""
    return None if mean is None or std is None else (tuple(mean), tuple(std))


def none_of(channels: int) -> Statistics:
    """No normalisation, of so many channels."""
    return (0.0,) * channels, (1.0,) * channels


def is_none(statistics: Statistics) -> bool:
    """Whether they change nothing."""
    return set(statistics[0]) == {0.0} and set(statistics[1]) == {1.0}


def name_of(statistics: Statistics) -> NormalizationName | None:
    """The name of well-known statistics."""
    if is_none(statistics):
        return "none"
    channels = len(statistics[0])
    known = ((name, (mean[:channels], std[:channels])) for name, (mean, std) in NORMALIZATIONS.items())
    return next((name for name, values in known if values == statistics), None)


def words(statistics: Statistics) -> str:
    """For messages: `normalization half`, or `mean 0.49 0.48 0.45, std 0.25 0.24 0.26`."""
    name = name_of(statistics)
    return f"normalization {name}" if name else f"mean {_numbers(statistics[0])}, std {_numbers(statistics[1])}"


def flags(statistics: Statistics, prefix: str = "--model.") -> str:
    """What to type for it in training."""
    name = name_of(statistics)
    if name:
        return f"{prefix}normalization {name}"
    return f"{prefix}mean {_numbers(statistics[0])} {prefix}std {_numbers(statistics[1])}"


def choice_note(said: Statistics | None, asked: Statistics | None, prefix: str = "--") -> str | None:
    """The line that tells what is used where nobody said it, or what is overridden; None where neither is so.

    Args:
        said: by the weights.
        asked: by flags, which begin with `prefix`.
    """
    if asked is None:
        return f"assumed: normalisation none ({prefix}mean and {prefix}std say otherwise)" if said is None else None
    if said is None or same(said, asked):
        return None
    return f"{prefix}mean and {prefix}std: {words(asked)}, in place of {words(said)} that the weights say"


def same(one: Statistics, other: Statistics) -> bool:
    """Whether they change images in the same way."""
    return one == other or (is_none(one) and is_none(other))


def fields_of(statistics: Statistics) -> dict[str, Any]:
    """`normalization`, `mean` and `std` of a configuration that stands for it; a name where there is one."""
    name = name_of(statistics)
    if name:
        return {"normalization": name, "mean": None, "std": None}
    return {"normalization": "none", "mean": statistics[0], "std": statistics[1]}


def to_metadata(statistics: Statistics) -> dict[str, str]:
    """The entries of a safetensors file's metadata."""
    return {"mean": json.dumps(statistics[0]), "std": json.dumps(statistics[1])}


def from_file(config: Mapping[str, Any] | None, metadata: Mapping[str, str] | None = None) -> Statistics | None:
    """What a file of ours says, by its metadata or else its configuration; None where neither does.

    Args:
        config: of the run that wrote it.
        metadata: of a safetensors file.
    """
    try:
        mean, std = (tuple(map(float, json.loads((metadata or {})[name]))) for name in ("mean", "std"))
        return mean, std
    except (KeyError, ValueError, TypeError):
        pass
    model = (config or {}).get("model") or {}
    # Older runs of pre-training, which have a decoder, had no such option and no normalisation.
    if not {"normalization", "decoder"} & model.keys():
        return None
    if model.get("mean") is not None and model.get("std") is not None:
        return tuple(model["mean"]), tuple(model["std"])
    channels = ((config or {}).get("data") or {}).get("channels", 3)
    name = model.get("normalization", "none")
    return none_of(channels) if name == "none" else tuple(v[:channels] for v in NORMALIZATIONS[name])  # type: ignore[return-value]


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.6g}" for value in values)
