"""From weights to a model: what was loaded, skipped, resized or left fresh is returned and printed, never guessed.

Shapes: N patch tokens (grid × grid), D width, K classes.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimir_fast.models.families import Architecture, all_families, find_family, recognise
from mimir_fast.models.file_names import from_files, to_files
from mimir_fast.models.patch_resize import with_patches_of
from mimir_fast.models.weight_files import NORMALIZATIONS, Weights, WeightsChoice, WeightsError, read_weights


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
        few = self.fresh if len(self.fresh) <= 8 else _summary(self.fresh)
        lines = [f"initialised from {self.origin}", f"  loaded   {len(self.loaded)} tensors"]
        for title, names in (("resized", self.resized), ("skipped", _summary(self.skipped)), ("fresh", few)):
            if names:
                lines.append(f"  {title:<8} {', '.join(names)}")
        return "\n".join(lines + [f"  note     {note}" for note in self.notes])


def initialize(model: nn.Module, source: str | Path | Weights, which: WeightsChoice = "auto") -> LoadReport:
    """Fill a classifier from pre-trained (or fine-tuned) weights.

    The position embedding is resized to the model's grid, the projection of patches to its patch size; a head for
    another number of classes, decoders and the norm of another pooling are left out; the classifier's own norm and head
    stay fresh where the weights have none.

    Args:
        model: a classifier, or an encoder by itself.
        source: anything `read_weights` reads, or weights already read.
    Returns:
        the report; print it.
    Raises:
        WeightsError: weights of another architecture, or incomplete.
    """
    weights = source if isinstance(source, Weights) else read_weights(source, which)
    report = LoadReport(weights.origin, notes=list(weights.notes))
    own = to_files(model, model.state_dict())
    tensors, report.resized = with_patches_of(weights.tensors, own)
    weights = replace(weights, tensors=dict(tensors))
    _check_architecture(weights, own)
    architecture = recognise(own)
    family = None if architecture is None else find_family(architecture.family)
    ready: dict[str, Tensor] = {}
    for name, tensor in weights.tensors.items():
        if name not in own:
            report.skipped.append(name)
        elif tensor.shape == own[name].shape:
            ready[name] = tensor
        elif name == "pos_embed":
            ready[name] = resize_positions(tensor, own[name].shape[1])
            report.resized.append(f"pos_embed {tuple(tensor.shape)} -> {tuple(own[name].shape)}")
        elif family is not None and (resized := family.resize(name, tensor, own[name].shape)) is not None:
            ready[name] = resized
            report.resized.append(f"{name} {tuple(tensor.shape)} -> {tuple(own[name].shape)}")
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
    biases = [name for name in own if name not in ready and _is_optional_bias(name, weights.tensors)]
    if biases:
        ready |= {name: torch.zeros_like(own[name]) for name in biases}
        report.notes.append(f"{len(biases)} biases of queries, keys and values are not in these weights: zero here")
    report.fresh = [name for name in own if name not in ready]
    absent = [name for name in report.fresh if not name.startswith(("head.", "fc_norm.", "norm."))]
    if absent:
        raise WeightsError(
            f"{weights.origin} is incomplete or of another architecture: {', '.join(absent[:4])} "
            f"({len(absent)} in all) are not in it; use a whole checkpoint of a plain vision transformer"
        )
    _note_normalization(model, weights, report)
    model.load_state_dict(from_files(model, ready), strict=False)
    report.loaded = list(ready)
    return report


def resize_positions(pos_embed_1TD: Tensor, num_rows: int) -> Tensor:
    """(1, num_rows, D): the grid resized by bicubic interpolation; a cls row in front of it is kept.

    Raises:
        WeightsError: the rows are no square grid, with or without a cls token, or only one of both has that token.
    """
    rows = pos_embed_1TD.shape[1]
    old, new = math.isqrt(rows), math.isqrt(num_rows)
    prefix = int(old**2 != rows)
    if old**2 + prefix != rows or new**2 + prefix != num_rows:
        raise WeightsError(
            f"a position embedding of {rows} rows does not become the model's {num_rows}: both must be square grids, "
            "with a cls row or without; models with a distillation token or registers cannot be used"
        )
    grid = pos_embed_1TD[:, prefix:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    resized = grid.flatten(2).transpose(1, 2).to(pos_embed_1TD.dtype)
    return torch.cat([pos_embed_1TD[:, :prefix], resized], dim=1)


def infer_architecture(weights: Weights) -> tuple[Architecture, int | None]:
    """The encoder, and the classes of the head if there is one, from the tensors alone: a bare file is enough.

    Raises:
        WeightsError: no encoder of ours has such tensors.
    """
    architecture = recognise(weights.tensors)
    if architecture is None:
        known = "; ".join(
            f"{family.title}: {', '.join(f'{name} ({words})' for name, words in family.sizes.items())}"
            for family in all_families().values()
        )
        raise WeightsError(f"{weights.origin} ({_outline(weights.tensors)}) is no encoder of ours. Those are {known}")
    saved = ((weights.config or {}).get("data") or {}).get("image_size")
    if saved is not None and not find_family(architecture.family).image_size_in_tensors:
        architecture = replace(architecture, image_size=saved)
    head = weights.tensors.get("head.weight")
    return architecture, None if head is None else len(head)


def _outline(tensors: Mapping[str, Tensor]) -> str:
    """Width, depth and patch of a plain vision transformer, for messages; the number of tensors of anything else."""
    depth = 1 + max((int(n.split(".")[1]) for n in tensors if re.match(r"blocks\.\d+\.", n)), default=-1)
    first = tensors.get("patch_embed.proj.weight")
    if first is None or first.ndim != 4 or not depth:
        return f"{len(tensors)} tensors"
    return f"width {first.shape[0]}, depth {depth}, patch {first.shape[-1]}, {first.shape[1]} channels"


def _check_architecture(weights: Weights, own: dict[str, Tensor]) -> None:
    theirs, ours = recognise(weights.tensors), recognise(own)
    if theirs is None or ours is None:  # odd sizes have no name: the shapes are compared one by one
        same = {n: t.shape for n, t in own.items() if n.startswith("blocks.")}
        if all(n in weights.tensors and weights.tensors[n].shape == shape for n, shape in same.items()):
            return
        raise WeightsError(
            f"{weights.origin} is of another architecture: {_outline(weights.tensors)}; the model has "
            f"{_outline(own)}. To use it: no encoder of ours has that width and depth"
        )
    flags = {"family": "--model.family", "size": "--model.encoder", "patch_size": "--model.patch_size",
             "channels": "--data.channels"}  # fmt: skip
    fixes = [f"{flag} {getattr(theirs, n)}" for n, flag in flags.items() if getattr(theirs, n) != getattr(ours, n)]
    if fixes:
        raise WeightsError(
            f"{weights.origin} is of another architecture: {_title(theirs)}; the model is {_title(ours)}. "
            f"To use it: {' '.join(fixes)}"
        )


def _title(architecture: Architecture) -> str:
    family = find_family(architecture.family)
    return (
        f"{family.title}-{architecture.size} ({family.sizes[architecture.size]}), patch {architecture.patch_size}, "
        f"{architecture.channels} channels"
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


def _is_optional_bias(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """A bias of queries, keys or values that the weights do without, so that zero is what they mean."""
    projection, _, kind = name.rpartition(".")
    known = projection.endswith((".attn.qkv", ".attn.qk", ".attn.q", ".attn.k", ".attn.v"))
    return kind == "bias" and known and name not in tensors and f"{projection}.weight" in tensors


def _summary(names: list[str]) -> list[str]:
    """`decoder_blocks.* (24)` instead of 24 names."""
    groups: dict[str, int] = {}
    for name in names:
        head, dot, _ = name.partition(".")
        groups[head + (".*" if dot else "")] = groups.get(head + (".*" if dot else ""), 0) + 1
    return [f"{name} ({count})" if count > 1 else name for name, count in groups.items()]
