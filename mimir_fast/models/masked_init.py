"""A masked model from weights: pre-training that goes on from MAE's, DINOv2's, the authors' or our own.

`initialize` takes the encoder, and the decoder where it is the model's in every tensor. Norms for adversarial images
that the file lacks start as copies of the clean ones, as in a fresh model.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from mimir_fast.layers.norms import SUFFIX, is_adapter
from mimir_fast.models.facts import Asked
from mimir_fast.models.file_names import to_files
from mimir_fast.models.loading import LoadReport, initialize
from mimir_fast.models.masked_loading import objective_of
from mimir_fast.models.masked_model import MaskedModel
from mimir_fast.models.weight_files import Weights, WeightsChoice, read_weights
from mimir_fast.validation import counted

_PARTS = {"decoder": "decoder_pred.weight", "head": "head.weight"}


def initialize_masked(
    model: MaskedModel, source: str | Path | Weights, which: WeightsChoice = "auto", part: str = "",
    asked: Asked | None = None,
) -> LoadReport:  # fmt: skip
    """Fill a masked model from pre-trained weights.

    Args:
        source: anything `read_weights` reads, or weights already read.
        part: which of several encoders in a file.
        asked: what the user says of a file.
    Returns:
        the report; print it. A note says whether decoder and head were loaded.
    Raises:
        WeightsError: weights of another architecture, or incomplete; see `initialize`.
    """
    weights = source if isinstance(source, Weights) else read_weights(source, which, part, asked)
    own = to_files(model, model.state_dict())
    copied = _copies(weights.tensors, own)
    report = initialize(model, replace(weights, tensors=weights.tensors | copied))
    if copied:
        report.notes.append(
            f"{counted(len(copied), 'tensor')} for adversarial images, not in these weights: copied from clean"
        )
    for name, tensor in _PARTS.items():
        if tensor not in own:
            continue
        if tensor in report.loaded:
            pixels = objective_of(weights).get("norm_pix_loss") if name == "decoder" else None
            learned = "" if pixels is None else f", it was trained with norm_pix_loss {str(pixels).lower()}"
            report.notes.append(f"the {name} is loaded{learned}")
        elif tensor in weights.tensors:
            report.notes.append(f"the {name} of these weights is not the model's: it starts fresh")
        else:
            report.notes.append(f"no {name} in these weights: it starts fresh")
    return report


def _copies(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """For each tensor for adversarial images of the model that is not there, the clean one."""
    missing = [name for name in own if is_adapter(name) and name not in tensors]
    clean = {name: name.removesuffix(SUFFIX) for name in missing}
    return {name: tensors[plain] for name, plain in clean.items() if plain in tensors}
