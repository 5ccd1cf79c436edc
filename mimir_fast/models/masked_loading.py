"""A pre-trained masked model out of a run or a file, for looking at its reconstructions and attacking them."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from mimir_fast.layers.norms import is_adapter
from mimir_fast.models.families import fields_of
from mimir_fast.models.identify import infer_architecture, is_run
from mimir_fast.models.loading import LoadReport, fill
from mimir_fast.models.masked_model import DECODERS, MaskedModel, ModelConfig, build_masked_model
from mimir_fast.models.normalization import Statistics
from mimir_fast.models.normalization import fields_of as statistics_fields
from mimir_fast.models.weight_files import Weights, WeightsChoice, WeightsError, read_weights
from mimir_fast.sizes import Size


def load_masked_model(
    source: str | Path | Weights, which: WeightsChoice = "auto", *, statistics: Statistics | None = None,
    image_size: Size | None = None,
) -> tuple[MaskedModel, dict[str, Any]]:  # fmt: skip
    """(model in eval mode and without gradients, the options of the method it was trained with).

    From anything `read_weights` reads; a bare file has no options: {} stands for MAE's, normalised patches and so on,
    but for what the file says otherwise.

    Args:
        statistics: (mean, std) to normalise by, in place of what the weights say; None where neither does is none.
        image_size: of images that are no squares, where the file does not say it.
    Raises:
        WeightsError: unreadable, of no encoder of ours, or without a decoder (an exported encoder, a classifier).
    """
    weights = source if isinstance(source, Weights) else read_weights(source, which)
    return masked_model_of(weights, statistics=statistics, image_size=image_size)[0], objective_of(weights)


def objective_of(weights: Weights) -> dict[str, Any]:
    """The options of the method that weights were trained with, as far as they say."""
    said = {} if weights.facts.norm_pixels is None else {"norm_pix_loss": weights.facts.norm_pixels}
    return (weights.config or {}).get("objective", said)


def masked_model_of(
    weights: Weights, *, statistics: Statistics | None = None, image_size: Size | None = None
) -> tuple[MaskedModel, LoadReport]:
    """The masked model that weights are of, and what became of them; see `load_masked_model`."""
    if "decoder_pred.weight" not in weights.tensors:
        raise WeightsError(
            f"{weights.origin} holds no decoder, so it is no masked autoencoder; give the pre-training run, not an "
            "exported encoder or a classifier"
        )
    architecture, num_classes = infer_architecture(weights, image_size=image_size)
    saved = (weights.config or {}).get("model", {})
    shown = {**fields_of(architecture), "adapters": any(is_adapter(name) for name in weights.tensors)}
    config = ModelConfig(**{f.name: saved[f.name] for f in fields(ModelConfig) if f.name in saved} | shown)
    if "decoder_embed.weight" in weights.tensors:
        width, heads = len(weights.tensors["decoder_embed.weight"]), weights.facts.decoder_heads
        decoder: Any = next((n for n, (w, _, h) in DECODERS.items() if w == width and heads in (None, h)), None)
        if decoder is None:
            of_heads = f" with {heads} heads" if heads is not None else ""
            raise WeightsError(f"{weights.origin}: a decoder {width} wide{of_heads} is none of {', '.join(DECODERS)}")
        config.decoder = decoder
    else:
        config.decoder = "linear"
    config = replace(config, **statistics_fields(weights.statistics(architecture.channels, statistics)))
    with torch.random.fork_rng([]):
        model = build_masked_model(config, architecture.image_size, architecture.channels, num_classes or 0)
    report = fill(model, weights, whole=True)
    if config.decoder != "linear" and weights.facts.decoder_heads is None and not is_run(weights):
        report.assumed.append(f"{DECODERS[config.decoder][2]} heads of the decoder")
    return model.eval().requires_grad_(False), report
