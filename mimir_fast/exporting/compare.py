"""Is an exported model the same function? Asked of what the format's own library reads back, on random images."""

from collections.abc import Callable

import torch
from torch import Tensor

from mimir_fast.exporting.original import Original

Function = Callable[[Tensor], Tensor]

EXAMPLE = 2
"""Images a format may record a model with."""
BATCHES = (1, 3)
"""Images it is compared on: never as many as it was recorded with, and one, at which sizes are easily mistaken."""
TOLERANCE = 1e-4
"""Largest difference, as a part of the largest output. Measured: 1e-6 and less."""


def difference(exported: Function, original: Original, wanted: Function | None = None) -> float:
    """The largest difference of the outputs as a part of the largest output.

    Args:
        exported: images (B, C, H, W) in [0, 1] to what the original, or `wanted`, gives for them.
    Raises:
        ValueError: it cannot take some number of images, gives another shape, or the original's outputs are no numbers.
    """
    parts = []
    for batch in BATCHES:
        images = original.images(batch)
        with torch.no_grad():
            right = (wanted or original.model)(images)
            if not right.isfinite().all():
                raise ValueError(f"{original.weights.origin} gives NaN or infinity on random images: nothing to export")
            try:
                given = exported(images)
            except Exception as error:  # each library raises its own
                line = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
                raise ValueError(f"what was written cannot take a batch of {batch}: {line}") from error
        if given.shape != right.shape:
            raise ValueError(
                f"what was written gives {tuple(given.shape)} for a batch of {batch}, not {tuple(right.shape)}"
            )
        parts.append((given - right).abs().max() / (right.abs().max() or 1.0))
    return float(torch.stack(parts).max())  # NaN, where one is: Python's max may pass over it
