"""Pictures a person looks at: reconstruction grids and loss curves.

Shapes: B images, C channels, H height, W width.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mimir_fast.training.loggers import read_lines


def grid(
    rows: dict[str, Tensor], captions: Mapping[str, Sequence[str]] | None = None, *, scale_to: int = 96
) -> np.ndarray:
    """uint8 (H, W, 3) picture: one labelled row for each entry of (B, C, H, W) images in [0, 1].

    Args:
        captions: row → a word under each of its images.
        scale_to: pixels of an image's longer side, which is brought up to it.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=13)
    label_width, gap = 118, 4
    count, _, high, wide = next(iter(rows.values())).shape
    # As large as they are, or the longer side brought up to scale_to.
    height, width = (max(scale_to * side // max(high, wide), side) for side in (high, wide))
    captions, line = captions or {}, 18
    total = gap + len(rows) * (height + gap) + sum(line for name in rows if name in captions)
    canvas = Image.new("RGB", (label_width + count * (width + gap), total), "white")
    draw, below = ImageDraw.Draw(canvas), gap
    for name, images in rows.items():
        top, below = below, below + height + gap + (line if name in captions else 0)
        for c, word in enumerate(captions.get(name, ())):
            place = label_width + c * (width + gap) + width / 2, top + height + line / 2
            draw.text(place, word, fill="black", font=font, anchor="mm")
        draw.text((6, top + height / 2), name, fill="black", font=font, anchor="lm")
        pixels = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
        for c, image in enumerate(pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels):
            tile = Image.fromarray(image.permute(1, 2, 0).numpy())
            tile = tile.resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(tile, (label_width + c * (width + gap), top))
    return np.asarray(canvas)


def save_curves(metrics: Path, output: Path, names: tuple[str, ...]) -> bool:
    """Draw the named scalars of a metrics.jsonl over the steps; False when there are fewer than two points."""
    from matplotlib.figure import Figure

    lines = [line for line in read_lines(metrics) if isinstance(line.get("step"), int)]
    series = {}
    for name in names:
        points = [(line["step"] + 1, line[name]) for line in lines if isinstance(line.get(name), (int, float))]
        if len(points) > 1:
            series[name] = points
    if not series:
        return False
    figure = Figure(figsize=(4.2 * len(series), 3.2), layout="constrained")
    for index, (name, points) in enumerate(series.items()):
        axes = figure.add_subplot(1, len(series), index + 1)
        axes.plot(*zip(*points, strict=True), linewidth=1.5)
        axes.set_title(name)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    figure.savefig(output, dpi=120)
    return True
