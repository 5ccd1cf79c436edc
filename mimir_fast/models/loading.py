"""From weights to a model: what was loaded, skipped, resized or left fresh is reported, never guessed.

Only these may be in a file and not in the model: a decoder and its mask token, a head that does not fit, the norm of
another pooling, the norms of another domain, and what the file's layout says is no part of the function. Anything else
would change the function, so it is refused by name.

Shapes: N patch tokens, D width, K classes.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimir_fast.layers.norms import is_adapter
from mimir_fast.models.encoder import Encoder
from mimir_fast.models.facts import Asked
from mimir_fast.models.families import (
    Architecture,
    Family,
    build_encoder,
    describe,
    find_family,
    informed,
    mask_unit_of,
    recognise,
)
from mimir_fast.models.file_names import DECODER, to_files
from mimir_fast.models.identify import (
    assumed_of,
    assumed_size,
    infer_architecture,
    is_run,
    known_of,
    outline,
    overridden,
    pool_of,
    said_pool,
)
from mimir_fast.models.load_report import LoadReport
from mimir_fast.models.normalization import Normalizer, flags, same, words
from mimir_fast.models.options import option_texts
from mimir_fast.models.patch_resize import with_patches_of
from mimir_fast.models.weight_files import Weights, WeightsChoice, WeightsError, read_weights
from mimir_fast.sizes import Size, area, divided, height_width
from mimir_fast.validation import counted

__all__ = ["LoadReport", "fill", "infer_architecture", "initialize", "inspect_weights", "resize_positions"]

_HEADS, _NORMS = ("head.", "head_dist."), ("fc_norm.", "norm.")
_PIECE = 2**19  # numbers that stay in the cache
_NUMBERS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def initialize(
    model: nn.Module, source: str | Path | Weights, which: WeightsChoice = "auto", part: str = "",
    asked: Asked | None = None,
) -> LoadReport:  # fmt: skip
    """Fill a classifier or a masked model from pre-trained (or fine-tuned) weights.

    The position embedding is resized to the model's grid, the projection of patches to its patch size; a head for
    another number of classes, decoders and the norm of another pooling are left out; the model's own norm, head and
    decoder stay fresh where the weights have none.

    Args:
        model: a Classifier or a MaskedModel.
        source: anything `read_weights` reads, or weights already read.
        part: which of several encoders in a file.
        asked: what the user says of a file.
    Returns:
        the report; print it.
    Raises:
        WeightsError: weights of another architecture, incomplete, or with NaN in them.
    """
    weights = source if isinstance(source, Weights) else read_weights(source, which, part, asked)
    own = to_files(model, model.state_dict())
    theirs, _ = infer_architecture(weights, into=_encoder_of(model))
    grids = _grids(theirs, model)
    tensors, resized = with_patches_of(weights.tensors, own)
    weights = replace(weights, tensors=dict(tensors))
    if resized and (ours := recognise(own, _size_of(model))) is not None:
        theirs = replace(theirs, patch_size=ours.patch_size)
    _check_architecture(weights, theirs, own, model)
    report = fill(model, weights, whole=False, grids=grids)
    report.resized = [*resized, *report.resized]
    if find_family(theirs.family).image_size_in_tensors:
        report.assumed += assumed_size(weights, theirs)
    return report


def fill(
    model: nn.Module, weights: Weights, *, whole: bool, grids: tuple[Size, Size] | None = None
) -> LoadReport:  # fmt: skip
    """Put weights into a model of their architecture.

    Args:
        whole: the model was built for these weights: nothing of it may stay fresh, nothing is resized, and NaN is
            noted. Else it goes on to be trained: heads, norms in front of them and decoders may be missing.
        grids: patches along the sides of their images and of the model's, where one of these is no square.
    Raises:
        WeightsError: by the name of the tensor that does not fit, is missing, is no tensor of numbers, or (not `whole`)
            holds NaN; in this case the model is filled nevertheless.
    """
    own = to_files(model, model.state_dict())
    architecture = recognise(own, _size_of(model))
    family = None if architecture is None else find_family(architecture.family)
    report = _report_of(weights)
    unfit = {} if whole else _unfit_heads(weights, own, family, model) | _unfit_decoder(weights, own, model)
    ready: dict[str, Tensor] = {}
    encoder = getattr(model, "encoder", None)
    num_patches = encoder.num_patches if isinstance(encoder, Encoder) else None
    for name, tensor in weights.tensors.items():
        if reason := unfit.get(name) or _may_be_left(name, own, whole=whole):
            report.reasons[name] = reason
            continue
        if name not in own:
            raise WeightsError(
                f"{weights.origin}: {name} is not in {_model_words(model)}, and without it the function is another: "
                "use weights of one of our encoders"
            )
        _check_numbers(name, tensor, own[name], weights.origin)
        fits = tensor.shape == own[name].shape
        resized = None
        if not whole and (
            not fits or (grids is not None and grids[0] != grids[1])
        ):  # 2 x 8 patches are as many as 4 x 4
            resized = _resize(name, tensor, own[name].shape, num_patches, family, grids)
        if fits and resized is None:
            ready[name] = tensor
            continue
        if resized is None:
            raise WeightsError(
                f"{weights.origin} is of another architecture: {name} is {tuple(tensor.shape)} there, "
                f"{tuple(own[name].shape)} in the model"
            )
        ready[name] = resized
        report.resized.append(f"{name} {tuple(tensor.shape)} -> {tuple(own[name].shape)}")
    biases = [name for name in own if name not in ready and _is_optional_bias(name, weights.tensors)]
    if biases:
        ready |= {name: torch.zeros_like(own[name]) for name in biases}
        report.notes.append(f"{len(biases)} biases of queries, keys and values are not in these weights: zero here")
    report.fresh = [name for name in own if name not in ready]
    _check_complete(report.fresh, ready, weights, whole=whole)
    # Tensors of the state dict share the model's memory.
    bad = [name for name, tensor in ready.items() if not _copy(own[name], tensor)]
    if bad:
        said = f"{bad[0]} holds NaN or infinity ({counted(len(bad), 'tensor does', 'tensors do')})"
        if not whole:
            raise WeightsError(f"{weights.origin}: {said}: training cannot start from it")
        report.notes.append(f"{said}: so will what it computes")
    if architecture is not None:
        report.notes += overridden(weights, architecture)
    if not is_run(weights):
        pool = pool_of(weights, architecture) if architecture is not None and "head.weight" in ready else None
        report.assumed = assumed_of(model, weights, family, pool)
    if not whole:
        _note_normalization(model, weights, report)
    report.loaded = list(ready)
    return report


def inspect_weights(weights: Weights) -> tuple[Architecture, LoadReport]:
    """What `fill` would say of an encoder of these weights, without one being made: for what only passes them on.

    Raises:
        WeightsError: as `fill`.
    """
    architecture, num_classes = infer_architecture(weights)
    with torch.device("meta"):
        encoder = build_encoder(architecture, final_norm="norm.weight" in weights.tensors)
    if any(is_adapter(name) for name in weights.tensors):
        encoder.add_adapters()
    own, report = encoder.state_dict(), _report_of(weights)
    beside = (*_HEADS, *_NORMS, *DECODER)
    for name, tensor in weights.tensors.items():
        if name in own:
            _check_numbers(name, tensor, own[name], weights.origin)
            if tensor.shape != own[name].shape:
                raise WeightsError(
                    f"{weights.origin}: {name} is {tuple(tensor.shape)}, {tuple(own[name].shape)} in "
                    f"{_title(architecture)}"
                )
            report.loaded.append(name)
        elif name.startswith("head") and not re.fullmatch(r"head(_dist)?\.(weight|bias)", name):
            report.reasons[name] = "no classification head of one linear layer"
        elif not name.startswith(beside):
            raise WeightsError(f"{weights.origin}: {name} is in none of our encoders")
    report.fresh = [n for n in own if n not in weights.tensors and not _is_optional_bias(n, weights.tensors)]
    _check_complete(report.fresh, {}, weights, whole=True)
    bad = [name for name in report.loaded if not _is_finite(weights.tensors[name])]
    report.notes += [
        f"{bad[0]} holds NaN or infinity ({counted(len(bad), 'tensor does', 'tensors do')})" for _ in bad[:1]
    ]
    report.notes += overridden(weights, architecture)
    if not is_run(weights):
        pool = None if num_classes is None else pool_of(weights, architecture)
        report.assumed = assumed_of(encoder, weights, find_family(architecture.family), pool)
        report.assumed += assumed_size(weights, architecture)
    return architecture, report


def _report_of(weights: Weights) -> LoadReport:
    """What is known before anything is loaded."""
    reasons = weights.left_out | dict.fromkeys(weights.unknown, "outside of the encoder; what it did is not done here")
    return LoadReport(weights.origin, weights.layout, reasons=reasons, notes=list(weights.notes))


def _may_be_left(name: str, own: Mapping[str, Tensor], *, whole: bool) -> str:
    """Why a tensor of a file need not be in the model; "" when it must."""
    if name in own or (whole and "head.weight" in own and name.startswith((*_HEADS, *_NORMS))):
        return ""
    if name.startswith(DECODER) and "decoder_pred.weight" not in own:
        return "the decoder"
    if is_adapter(name):
        return "for adversarial images, which the model keeps no norms of their own for"
    if name.startswith(_NORMS):
        return "the norm of another pooling"
    return "the model has no such head" if name.startswith(_HEADS) else ""


def _unfit_heads(
    weights: Weights, own: Mapping[str, Tensor], family: Family | None, model: nn.Module
) -> dict[str, str]:  # fmt: skip
    """Tensors of a head that start fresh → why: for other classes, or trained on other features."""
    tensors = weights.tensors
    norms = [norm for norm in _NORMS if f"{norm}weight" in own and f"{norm}weight" not in tensors]
    pool, said = getattr(getattr(model, "config", None), "global_pool", None), family and said_pool(weights, family)
    if None not in (pool, said) and pool != said:
        norms.append("pooling")
    # timm of 2021 has a layer in front of the head of ImageNet-21k.
    reasons = {name: "a layer of another head" for name in tensors if name.startswith("pre_logits.")}
    if reasons:
        norms.append("pre_logits.")
    for head in _HEADS:
        theirs, ours = tensors.get(f"{head}weight"), own.get(f"{head}weight")
        if theirs is None or ours is None:
            continue
        reason = "trained on features of another pooling, so it starts fresh" if norms else ""
        if len(theirs) != len(ours):
            reason = (
                f"the head had {counted(len(theirs), 'class', 'classes')}, the model has {len(ours)}: it starts fresh"
            )
        if reason:
            reasons |= {name: reason for name in tensors if name.startswith(head)}
    return reasons


def _unfit_decoder(weights: Weights, own: Mapping[str, Tensor], model: nn.Module) -> dict[str, str]:
    """Tensors of a decoder that is not the model's → why. One is taken as a whole or not at all."""
    tensors, heads = weights.tensors, weights.facts.decoder_heads
    theirs, ours = (
        {n: t.shape for n, t in named.items() if n.startswith(DECODER) and n != "decoder_pos_embed"}
        for named in (tensors, own)
    )
    found = {getattr(part, "num_heads", heads) for part in getattr(model, "decoder", nn.Module()).modules()}
    if (theirs == ours and (heads is None or found == {heads})) or "decoder_pred.weight" not in own:
        return {}
    return {n: "of another decoder, the model's starts fresh" for n in tensors if n.startswith(DECODER)}


def _resize(
    name: str, tensor: Tensor, shape: torch.Size, num_patches: int | None, family: Family | None,
    grids: tuple[Size, Size] | None,
) -> Tensor | None:  # fmt: skip
    if name in ("pos_embed", "decoder_pos_embed") and tensor.ndim == 3 and tensor.shape[-1] == shape[-1]:
        return resize_positions(tensor, shape[1], None if num_patches is None else shape[1] - num_patches, grids)
    return None if family is None else family.resize(name, tensor, shape, *(grids or ()))


def _encoder_of(model: nn.Module) -> Encoder | None:
    """Of a model of ours."""
    encoder = getattr(model, "encoder", model)
    return encoder if isinstance(encoder, Encoder) else None


def _size_of(model: nn.Module) -> Size | None:
    """Size of the images of a model of ours."""
    encoder = _encoder_of(model)
    return None if encoder is None else encoder.image_size


def _grids(theirs: Architecture | None, model: nn.Module) -> tuple[Size, Size] | None:
    """Patches along the sides of the images of the weights and of the model, where one of these is no square."""
    encoder = getattr(model, "encoder", model)
    if theirs is None or find_family(theirs.family).sized is None or not isinstance(encoder, Encoder):
        return None
    grids = divided(theirs.image_size, mask_unit_of(theirs)), encoder.grid
    return None if isinstance(grids[0], int) and isinstance(grids[1], int) else grids


def _check_numbers(name: str, tensor: Tensor, own: Tensor, origin: str) -> None:
    """Raises WeightsError where a tensor cannot be copied as it is."""
    words = ""
    if tensor.is_meta:
        words = "has a shape and no numbers (it was saved on the meta device)"
    elif tensor.layout != torch.strided or tensor.is_quantized:
        words = "is quantised or sparse"
    elif own.is_floating_point() and tensor.dtype not in _NUMBERS:
        words = f"holds {str(tensor.dtype).removeprefix('torch.')}, wanted float32, float16 or bfloat16"
    if words:
        raise WeightsError(f"{origin}: {name} {words}: save the weights as float32 where they were made")


def _check_complete(fresh: list[str], ready: Mapping[str, Tensor], weights: Weights, *, whole: bool) -> None:
    """Raises WeightsError when what is missing cannot start fresh."""
    optional = () if whole else (*_HEADS, *_NORMS)
    if not whole and "decoder_pred.weight" not in ready:
        optional = (*optional, *DECODER)  # a decoder is there as a whole or not at all
    absent = [name for name in fresh if not name.startswith(optional)]
    if absent:
        raise WeightsError(
            f"{weights.origin} is incomplete or of another architecture: {', '.join(absent[:4])} "
            f"({len(absent)} in all) are not in it; use a whole checkpoint"
        )


@torch.no_grad()
def _copy(target: Tensor, tensor: Tensor) -> bool:
    """Copy, and whether all numbers are finite: a piece is looked at while it is still in the cache.

    A large file is mapped and not read at once, so this is the one pass over its numbers, and there is no second copy.
    """
    if tensor.ndim == 0 or not target.is_floating_point():
        target.copy_(tensor)
        return bool(target.isfinite()) if tensor.ndim == 0 else True
    rows = max(1, _PIECE * len(tensor) // max(tensor.numel(), 1))
    finite = True
    for ours, theirs in zip(target.split(rows), tensor.split(rows), strict=True):
        finite &= _is_finite(ours.copy_(theirs))
    return finite


def _is_finite(tensor: Tensor) -> bool:
    # One number a tensor; only where the sum overflows is every number looked at.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def _model_words(model: nn.Module) -> str:
    family = getattr(getattr(model, "config", None), "family", None)
    return f"our {find_family(family).title}" if isinstance(family, str) else "the model"


def resize_positions(
    pos_embed_1TD: Tensor, num_rows: int, num_prefix: int | None = None, grids: tuple[Size, Size] | None = None
) -> Tensor:
    """(1, num_rows, D): the grid resized by bicubic interpolation; the rows in front of it are kept.

    Args:
        num_prefix: how many these are (cls token, registers); None for one where the rows are no square, else none.
        grids: the old and the new one; None for squares.
    Raises:
        WeightsError: the other rows are no such grid, here or there.
    """
    rows = pos_embed_1TD.shape[1]
    prefix = int(math.isqrt(rows) ** 2 != rows) if num_prefix is None else num_prefix
    old, new = grids or (math.isqrt(max(0, count - prefix)) for count in (rows, num_rows))
    if area(old) + prefix != rows or area(new) + prefix != num_rows:
        raise WeightsError(
            f"a position embedding of {rows} rows does not become the model's {num_rows}: both must be "
            f"{'whole' if grids else 'square'} grids behind {prefix} rows of cls token and registers"
        )
    grid = pos_embed_1TD[:, prefix:].float().reshape(1, *height_width(old), -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=height_width(new), mode="bicubic", align_corners=False)
    resized = grid.flatten(2).transpose(1, 2).to(pos_embed_1TD.dtype)
    return torch.cat([pos_embed_1TD[:, :prefix], resized], dim=1)


def _check_architecture(
    weights: Weights, theirs: Architecture, own: dict[str, Tensor], model: nn.Module
) -> None:  # fmt: skip
    ours = recognise(own, _size_of(model))
    if ours is None:  # a model of another maker: the shapes are compared one by one
        same = {n: t.shape for n, t in own.items() if n.startswith("blocks.")}
        if all(n in weights.tensors and weights.tensors[n].shape == shape for n, shape in same.items()):
            return
        raise WeightsError(
            f"{weights.origin} is of another architecture: {outline(weights.tensors)}; the model has "
            f"{outline(own)}. To use it: no encoder of ours has that width and depth"
        )
    flags = {"family": "--model.family", "size": "--model.encoder", "patch_size": "--model.patch_size",
             "channels": "--data.channels"}  # fmt: skip
    encoder = getattr(model, "encoder", None)
    ours = informed(ours, encoder.options) if isinstance(encoder, Encoder) else ours
    fixes = [f"{flag} {getattr(theirs, n)}" for n, flag in flags.items() if getattr(theirs, n) != getattr(ours, n)]
    # Where the final norm stands is the pooling's affair, a missing bias of q, k, v is a bias of zero, and of what the
    # file says nothing the flags are right.
    family = find_family(theirs.family)
    silent = {*family.unseen} - known_of(weights, family).keys() if not is_run(weights) else set()
    free = {"norm_before_pool", "qkv_bias", *silent}
    wanted, has = ({n: value for n, value in a.options.items() if n not in free} for a in (theirs, ours))
    if wanted != has:
        kept = {n: v for n, v in ours.options.items() if n in silent}
        texts = option_texts(wanted | kept | {n: v for n, v in theirs.options.items() if n == "qkv_bias"})
        fixes.append(f"--model.options {' '.join(texts)}" if texts else "leave --model.options out")
    if fixes:
        raise WeightsError(
            f"{weights.origin} is of another architecture: {_title(theirs)}; the model is {_title(ours)}. "
            f"To use it: {' '.join(fixes)}"
        )


def _title(architecture: Architecture) -> str:
    return f"{describe(architecture)}, patch {architecture.patch_size}, {architecture.channels} channels"


def _note_normalization(model: nn.Module, weights: Weights, report: LoadReport) -> None:
    normalizer, said = getattr(model, "normalizer", None), weights.normalization
    if isinstance(normalizer, Normalizer) and said is not None and not same(said, normalizer.statistics):
        report.notes.append(
            f"these weights were trained with {words(said)}, the model has {words(normalizer.statistics)}: "
            f"use {flags(said)}"
        )


def _is_optional_bias(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """A bias of queries, keys or values that the weights do without, so that zero is what they mean."""
    projection, _, kind = name.rpartition(".")
    known = projection.endswith((".attn.qkv", ".attn.qk", ".attn.q", ".attn.k", ".attn.v"))
    return kind == "bias" and known and name not in tensors and f"{projection}.weight" in tensors
