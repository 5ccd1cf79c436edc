"""From weights to a model: what was loaded, skipped, resized or left fresh is returned and printed, never guessed.

Shapes: N patch tokens (grid × grid), D width, K classes.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimir_fast.models.masked_autoencoder import ENCODERS, EncoderName
from mimir_fast.models.normalization import NORMALIZATIONS
from mimir_fast.models.weight_files import Weights, WeightsChoice, WeightsError, read_weights


@dataclass
class LoadReport:
    """What `initialize` did, by tensor name."""

    origin: str
    loaded: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """In the file, not in the model: a decoder, another head."""
    resized: list[str] = field(default_factory=list)
    """With old and new shape."""
    fresh: list[str] = field(default_factory=list)
    """In the model, not in the file: left as initialised."""
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"initialised from {self.origin}", f"  loaded   {len(self.loaded)} tensors"]
        for title, names in (("resized", self.resized), ("skipped", _summary(self.skipped)), ("fresh", self.fresh)):
            if names:
                lines.append(f"  {title:<8} {', '.join(names)}")
        return "\n".join(lines + [f"  note     {note}" for note in self.notes])


def initialize(model: nn.Module, source: str | Path | Weights, which: WeightsChoice = "auto") -> LoadReport:
    """Fill a classifier from pre-trained (or fine-tuned) weights.

    The position embedding is resized to the model's grid; a head for another number of classes, decoders and the
    norm of another pooling are left out; the classifier's own norm and head stay fresh where the weights have none.

    Args:
        model: a VisionTransformer.
        source: anything `read_weights` reads, or weights already read.
    Returns:
        the report; print it.
    Raises:
        WeightsError: weights of another architecture, or incomplete.
    """
    weights = source if isinstance(source, Weights) else read_weights(source, which)
    report = LoadReport(weights.origin, notes=list(weights.notes))
    own = model.state_dict()
    _check_architecture(weights, own)
    ready: dict[str, Tensor] = {}
    for name, tensor in weights.tensors.items():
        if name not in own:
            report.skipped.append(name)
        elif tensor.shape == own[name].shape:
            ready[name] = tensor
        elif name == "pos_embed":
            ready[name] = resize_positions(tensor, own[name].shape[1] - 1)
            report.resized.append(f"pos_embed {tuple(tensor.shape)} -> {tuple(own[name].shape)}")
        elif name.startswith("head."):
            report.skipped.append(name)
            if name == "head.bias":
                report.notes.append(
                    f"the head had {len(tensor)} classes, the model has {len(own[name])}: it starts fresh"
                )
        else:
            raise WeightsError(
                f"{weights.origin} is of another architecture: {name} is {tuple(tensor.shape)} there, "
                f"{tuple(own[name].shape)} in the model"
            )
    report.fresh = [name for name in own if name not in ready]
    absent = [name for name in report.fresh if not name.startswith(("head.", "fc_norm.", "norm."))]
    if absent:
        raise WeightsError(
            f"{weights.origin} is incomplete or of another architecture: {', '.join(absent[:4])} "
            f"({len(absent)} in all) are not in it; use a whole checkpoint of a plain vision transformer"
        )
    _note_normalization(model, weights, report)
    model.load_state_dict(ready, strict=False)
    report.loaded = list(ready)
    return report


def resize_positions(pos_embed_1TD: Tensor, num_patches: int) -> Tensor:
    """(1, 1 + num_patches, D): the grid resized by bicubic interpolation, the cls row kept.

    Raises:
        WeightsError: the rows are no cls token and a square grid.
    """
    old, new = math.isqrt(pos_embed_1TD.shape[1] - 1), math.isqrt(num_patches)
    if old**2 != pos_embed_1TD.shape[1] - 1 or new**2 != num_patches:
        raise WeightsError(
            f"a position embedding of {pos_embed_1TD.shape[1]} rows is no cls row and a square grid: models with a "
            "distillation token, registers, or without cls token cannot be used"
        )
    grid = pos_embed_1TD[:, 1:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    rows = grid.flatten(2).transpose(1, 2).to(pos_embed_1TD.dtype)
    return torch.cat([pos_embed_1TD[:, :1], rows], dim=1)


@dataclass(frozen=True)
class EncoderShape:
    """What the shapes of a vision transformer's tensors tell."""

    encoder: EncoderName
    patch_size: int
    image_size: int
    channels: int
    num_classes: int | None


def infer_shape(weights: Weights) -> EncoderShape:
    """Encoder, patch, image size and classes from the tensors alone, so that a bare file needs no configuration.

    Raises:
        WeightsError: no encoder of ours has this width and depth.
    """
    t = weights.tensors
    width, channels, patch_size, _ = t["patch_embed.proj.weight"].shape
    depth = _depth(t)
    encoder = _encoder_name(width, depth)
    if encoder is None:
        known = ", ".join(f"{n} {w}/{d}" for n, (w, d, _) in ENCODERS.items())
        raise WeightsError(
            f"{weights.origin}: width {width} and depth {depth} are no encoder of ours (those are {known})"
        )
    if "pos_embed" not in t or t["pos_embed"].shape[1] - 1 != math.isqrt(t["pos_embed"].shape[1] - 1) ** 2:
        raise WeightsError(f"{weights.origin} has no position embedding of a cls token and a square grid")
    grid = math.isqrt(t["pos_embed"].shape[1] - 1)
    return EncoderShape(
        encoder, patch_size, grid * patch_size, channels, len(t["head.weight"]) if "head.weight" in t else None
    )


def _depth(tensors: dict[str, Tensor]) -> int:
    numbers = [
        int(name.split(".")[1]) for name in tensors if name.startswith("blocks.") and name.split(".")[1].isdigit()
    ]
    return max(numbers, default=-1) + 1


def _encoder_name(width: int, depth: int) -> EncoderName | None:
    return next((name for name, (w, d, _) in ENCODERS.items() if (w, d) == (width, depth)), None)


def _check_architecture(weights: Weights, own: dict[str, Tensor]) -> None:
    name = "patch_embed.proj.weight"
    theirs, ours = weights.tensors[name].shape, own[name].shape
    depths = _depth(weights.tensors), _depth(own)
    if theirs == ours and depths[0] == depths[1]:
        return
    fixes = []
    if theirs[0] != ours[0] or depths[0] != depths[1]:
        fit = _encoder_name(theirs[0], depths[0])
        fixes.append(f"--model.encoder {fit}" if fit else "no encoder of ours has that width and depth")
    if theirs[-1] != ours[-1]:
        fixes.append(f"--model.patch_size {theirs[-1]}")
    if theirs[1] != ours[1]:
        fixes.append(f"--data.channels {theirs[1]}")
    raise WeightsError(
        f"{weights.origin} is of another architecture: "
        f"width {theirs[0]}, depth {depths[0]}, patch {theirs[-1]}, {theirs[1]} channels; the model has "
        f"width {ours[0]}, depth {depths[1]}, patch {ours[-1]}, {ours[1]} channels. "
        f"To use it: {' '.join(fixes)}"
    )


def _note_normalization(model: nn.Module, weights: Weights, report: LoadReport) -> None:
    if weights.normalization is None:
        return
    chosen = getattr(getattr(model, "config", None), "normalization", None)
    fit = next((n for n, stats in NORMALIZATIONS.items() if stats == weights.normalization), None)
    if fit is not None and chosen is not None and fit != chosen:
        report.notes.append(
            f"these weights were trained with normalization {fit}, the model has {chosen}: "
            f"use --model.normalization {fit}"
        )


def _summary(names: list[str]) -> list[str]:
    """`decoder_blocks.* (24)` instead of 24 names."""
    groups: dict[str, int] = {}
    for name in names:
        head, dot, _ = name.partition(".")
        groups[head + (".*" if dot else "")] = groups.get(head + (".*" if dot else ""), 0) + 1
    return [f"{name} ({count})" if count > 1 else name for name, count in groups.items()]
