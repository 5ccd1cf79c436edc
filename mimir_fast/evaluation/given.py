"""Evaluate a model and images that Python has in memory: no checkpoint, no data set, no process of its own.

from mimir_fast.evaluation import evaluate

results = evaluate(model, images, labels, norm="linf", eps=8 / 255)
results.robust["accuracy"], results.robust["interval"], results.notes
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import fields
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mimir_fast.data.config import DataConfig
from mimir_fast.data.sources.base import ArraySource
from mimir_fast.evaluation.adapters import given_model
from mimir_fast.evaluation.config import EvaluateConfig
from mimir_fast.evaluation.results import Results
from mimir_fast.evaluation.run import Given, evaluate_in
from mimir_fast.layers.borrowing import borrowed
from mimir_fast.ops._checks import check_tensors
from mimir_fast.sizes import as_size
from mimir_fast.validation import nearest, number_of
from mimir_fast.world import World

SOURCE = "memory"


def evaluate(
    model: nn.Module | Callable[[Tensor], Any], images: Tensor, labels: Tensor | Sequence[int], *,
    classes: Sequence[str] | None = None, output_dir: str | None = None, log: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> Results:  # fmt: skip
    """What `python -m mimir_fast.evaluate` does, on a model and images in memory. The model is left as it was.

    Args:
        model: a module in fp32, or any callable: images (B, C, H, W) in [0, 1] → logits (B, K). It is judged in eval
            mode, on the device of its weights (of the images, where it has none).
        images: (N, C, H, W), C 1 or 3: uint8, or floats that are multiples of 1/255, as decoded images are.
        labels: (N,) class numbers.
        classes: K names; left out: 0 … K−1.
        output_dir: keeps results.json and report.html there, and goes on where a run that was stopped left off; left
            out: nothing stays on disk.
        log: told one line a measurement.
        options: those of the command (`EvaluateConfig`): suite, norm, eps, restarts, mean, std, … All images are
            evaluated unless `limit` is given.
    Raises:
        ValueError: the model, the images or an option does not fit; the message names the fix.
    """
    options = _as_typed(options)
    pixels = _as_uint8(images)
    numbers = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    weights = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    device = (weights[0] if weights else images).device
    channels, image_size = pixels.shape[1], as_size(pixels.shape[2:])
    with ExitStack() as stack:
        if isinstance(model, nn.Module):
            stack.enter_context(borrowed(model, "eval"))
        judged = given_model(
            model, device=device, channels=channels, image_size=image_size, mean=options.get("mean"),
            std=options.get("std"), probabilities=options.get("outputs") == "probabilities",
        )  # fmt: skip
        data = DataConfig(image_size=image_size, channels=channels)
        data.source = SOURCE  # no registered one: nothing on disk, so nothing an option could name
        config = EvaluateConfig(
            judged.name, data=data,
            output_dir=output_dir or stack.enter_context(TemporaryDirectory()), **{"limit": len(pixels), **options},
        )  # fmt: skip
        if classes is None:
            with torch.no_grad():
                logits = judged.module(torch.from_numpy(pixels[:2]).to(device).float() / 255)
            classes = [str(number) for number in range(logits.shape[-1])]
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(classes):
            raise ValueError(f"labels are {numbers.min()} to {numbers.max()}, wanted 0 to {len(classes) - 1}")
        source = ArraySource(SOURCE, pixels, numbers.astype(np.int64), classes)
        said = "".join(f", {name}={value!r}" for name, value in options.items())
        command = f"mimir_fast.evaluation.evaluate(model, images, labels{said})"
        results = evaluate_in(World(0, 1, device), config, log, Given(judged, source, command))
    results.choices["output_dir"] = output_dir
    return results


def _as_typed(options: dict[str, Any]) -> dict[str, Any]:
    """With numbers in place of their text ("8/255"); refuses names of no option."""
    known = {option.name: option for option in fields(EvaluateConfig) if option.init}
    for name in options:
        if name not in known:
            raise ValueError(f"{name} is no option of evaluate(model, images, labels){nearest(name, known)}")
    numbers = {name for name, option in known.items() if option.type in (float, float | None)}
    return {
        name: number_of(name, value) if name in numbers and isinstance(value, str) else value
        for name, value in options.items()
    }


def _as_uint8(images: Tensor) -> np.ndarray:
    """(N, C, H, W) uint8 on the CPU."""
    check_tensors(images=images)
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images are of shape {tuple(images.shape)}, wanted (N, 1 or 3, H, W)")
    if images.dtype == torch.uint8:
        return images.cpu().numpy()
    levels = 255 * images.detach().cpu().double()
    if not levels.isfinite().all():
        raise ValueError("images hold NaN or infinity")
    if not images.is_floating_point() or not (levels - levels.round()).abs().max() < 1e-3:
        raise ValueError(
            f"images ({images.dtype}) are no multiples of 1/255, which decoded images are: round them, "
            "(255 * images).round().to(torch.uint8)"
        )
    if levels.min() < -1e-3 or levels.max() > 255 + 1e-3:
        raise ValueError(
            f"images reach from {float(images.min()):g} to {float(images.max()):g}, wanted [0, 1]: leave the "
            "normalisation to the model, or name it (mean=…, std=…)"
        )
    return levels.round().to(torch.uint8).numpy()
