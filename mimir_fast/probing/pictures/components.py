"""Patch tokens in colour: their first three principal components as red, green and blue, clean and under attack.

As DINOv2's pictures (arXiv 2304.07193, Fig. 1), without the separation of foreground. Components and the range of each
come from the clean images alone and serve both, so a colour means the same everywhere.
Shapes: M tokens, D width.
"""

import torch
from torch import Tensor

from mimir_fast.evaluation.html import paragraph, tiles
from mimir_fast.evaluation.topics.examples import png
from mimir_fast.probing.picture import PICTURES, Numbers, Picture, View, grid_of


def principal(tokens_MD: Tensor) -> tuple[Tensor, Tensor, list[float]]:
    """(mean (D,), directions (D, 3), shares of the variance); the largest entry of a direction is positive."""
    mean = tokens_MD.mean(dim=0)
    _, sizes, rows = torch.linalg.svd(tokens_MD - mean, full_matrices=False)
    directions = tokens_MD.new_zeros(tokens_MD.shape[1], 3)
    for index, row in enumerate(rows[:3]):
        directions[:, index] = row * row[row.abs().argmax()].sign()
    total = float(sizes.square().sum()) or 1.0
    return mean, directions, [float(size**2) / total for size in sizes[:3]]


def look(view: View) -> tuple[Numbers, str] | None:
    """The tokens of a few images in colour; None where the tokens are no grid."""
    few, clean, attacked = view.shown
    with torch.no_grad():
        before = _patches(view, clean)
        after = None if attacked is None else _patches(view, attacked)
    grid = grid_of(before.shape[1], *clean.shape[-2:])
    if grid is None or before.shape[1] < 4:
        words = f"An image has {before.shape[1]} tokens of patches here, too few or no grid: nothing to colour."
        return {"reason": words}, paragraph(words)
    mean, directions, shares = principal(before.flatten(0, 1))
    low, high = ((before - mean) @ directions).flatten(0, 1).quantile(torch.tensor([0.01, 0.99]).to(before), dim=0)

    def colours(tokens_PD: Tensor) -> str:
        levels = ((tokens_PD - mean) @ directions - low) / (high - low).clamp_min(1e-12)
        return png(levels.T.reshape(3, *grid))

    rows = []
    for index, label in enumerate(few.labels.tolist()):
        cells = [(few.classes[label], png(clean[index])), ("tokens", colours(before[index]))]
        if attacked is not None and after is not None:
            cells += [("attacked", png(attacked[index])), ("tokens, attacked", colours(after[index]))]
        rows.append(tiles(cells))
    words = (
        f"Each patch's token by its first three principal components ({', '.join(f'{100 * s:.0f} %' for s in shares)} "
        "of the variance) as red, green and blue. Components are those of the clean images: equal colours are equal "
        "content, in every picture."
    )
    return {"variance": shares}, paragraph(words, "soft") + "".join(rows)


def _patches(view: View, images: Tensor) -> Tensor:
    return view.encoder.tokens(images)[:, view.encoder.num_prefix :].float()


PICTURES.add("components", Picture("components", "Patch tokens, their principal components", look, order=20))
