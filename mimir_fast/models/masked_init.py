"""A masked model from weights: pre-training that goes on from MAE's, DINOv2's, the authors' or our own.

The encoder is `initialize`'s. The decoder is taken if it is the model's in every tensor, and starts fresh otherwise:
half a decoder is none. So is a head (`single_stage`). Norms for adversarial images that the file lacks start as copies
of the clean ones, as in a fresh model.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from mimir_fast.layers.norms import SUFFIX, is_adapter
from mimir_fast.models.loading import LoadReport, initialize
from mimir_fast.models.masked_model import MaskedModel
from mimir_fast.models.weight_files import Weights, WeightsChoice, read_weights

_DECODER = ("decoder_", "mask_token")
_TABLE = "decoder_pos_embed"  # of sines and cosines, computed for the grid: whatever a file has is not missed


def initialize_masked(model: MaskedModel, source: str | Path | Weights, which: WeightsChoice = "auto") -> LoadReport:
    """Fill a masked model from pre-trained weights.

    Args:
        source: anything `read_weights` reads, or weights already read.
    Returns:
        the report; print it. A note says whether the decoder was loaded.
    Raises:
        WeightsError: weights of another architecture, or incomplete; see `initialize`.
    """
    weights = source if isinstance(source, Weights) else read_weights(source, which)
    decoder = {name: t for name, t in weights.tensors.items() if name.startswith(_DECODER)}
    head = {name: t for name, t in weights.tensors.items() if name.startswith("head.")}
    encoder = {name: t for name, t in weights.tensors.items() if name not in decoder and name not in head}
    copied = _copies(encoder, model.encoder)
    report = initialize(model.encoder, replace(weights, tensors=encoder | copied))
    if copied:
        report.notes.append(f"{len(copied)} tensors for adversarial images are not in these weights: copied from clean")
    own = dict(model.decoder.state_dict())
    if model.full_length:
        own["mask_token"] = model.mask_token
    _take("decoder", own, decoder, report)
    if model.head is not None:
        _take("head", {f"head.{name}": t for name, t in model.head.state_dict().items()}, head, report)
    else:
        report.skipped += head
    return report


def _take(part: str, own: Mapping[str, Tensor], found: Mapping[str, Tensor], report: LoadReport) -> None:
    """Copy what was found of a part into the model's tensors if it is all of it, and say so."""
    if not found:
        report.fresh += own
        report.notes.append(f"no {part} in these weights: it starts fresh")
        return
    wanted = {name: t.shape for name, t in own.items() if name != _TABLE}
    if wanted != {name: t.shape for name, t in found.items() if name != _TABLE}:
        report.fresh += own
        report.skipped += found
        report.notes.append(f"the {part} of these weights is not the model's: it starts fresh")
        return
    with torch.no_grad():
        for name in wanted:
            own[name].copy_(found[name])
    report.loaded += wanted
    report.notes.append(f"the {part} is loaded")


def _copies(tensors: Mapping[str, Tensor], encoder: nn.Module) -> dict[str, Tensor]:
    """For each tensor for adversarial images of the encoder that is not there, the clean one."""
    missing = [name for name in encoder.state_dict() if is_adapter(name) and name not in tensors]
    clean = {name: name.removesuffix(SUFFIX) for name in missing}
    return {name: tensors[plain] for name, plain in clean.items() if plain in tensors}
