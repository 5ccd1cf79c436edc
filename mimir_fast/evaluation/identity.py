"""What the numbers of an evaluation depend on; a folder goes on only with what it began with.

A model is known by its weights and by its answers to the first images: weights can hide where no state dict shows them
(in a closure, in a plain list), and answers depend on more than weights. Answers are floating-point numbers, which
another machine or library rounds otherwise, so they are compared (`changes.same`) and not hashed.

Shapes: B images, C channels, H × W pixels, K classes.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mimir_fast.data.sources.base import ImageSource
from mimir_fast.evaluation.adapters import JudgedModel
from mimir_fast.evaluation.content import content_of, digest
from mimir_fast.evaluation.images import Fitting
from mimir_fast.evaluation.options import CommonOptions
from mimir_fast.evaluation.results import PACKAGES
from mimir_fast.versions import version_of

FIRST = 8
"""Images whose answers are kept."""
_SKETCH = 4
"""Numbers kept of an answer: a thousand logits of each image would fill the files."""
_ROUNDING = 1e-3
"""Relative difference of the answers of one model on two machines, at most."""


def identity_of(
    config: CommonOptions, preprocessing: str, source: ImageSource, indices: np.ndarray, fitting: Fitting
) -> dict[str, Any]:
    """What the numbers of all topics depend on beside the model: images, options of all attacks, packages."""
    size = config.data.image_size
    return {
        "outputs": config.outputs,
        "preprocessing": preprocessing,
        "data": {
            "source": config.data.source, "content": content_of(source, indices),
            "size": list(size) if isinstance(size, tuple) else size, "channels": config.data.channels,
            **fitting.as_dict(),
        },
        "indices": digest([indices.tobytes()]),
        "num_images": len(indices),
        **{name: getattr(config, name) for name in ("norm", "eps", "alpha", "restarts", "seed")},
        "packages": {name: version_of(name) for name in ("mimir-fast", "torch", "timm", *PACKAGES)},
    }  # fmt: skip


def identity_of_model(judged: JudgedModel, logits: Tensor, spread: float) -> dict[str, Any]:
    """How a model is known again; JSON-able.

    Args:
        logits: (B, K) of the first images.
        spread: relative difference between two answers to the same images, of a model that is not deterministic.
    """
    numbers = torch.arange(1, logits.shape[1] + 1, dtype=torch.float64)
    directions = torch.sin(numbers[:, None] * torch.arange(1, _SKETCH + 1))
    sketch = logits.detach().cpu().double() @ directions
    return {
        "weights": judged.digest(),
        "answers": {
            "sketch": [[float(f"{value:.6g}") for value in row] for row in sketch.tolist()],
            "sizes": [float(f"{value:.6g}") for value in logits.detach().cpu().double().norm(dim=1).tolist()],
            "tolerance": float(f"{max(_ROUNDING, 4 * spread):.3g}"),
        },
    }
