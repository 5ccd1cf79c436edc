"""Attention maps: which patches the cls token, and the patches themselves, look at; clean and under attack."""

import torch
from torch import Tensor

from mimir_fast.evaluation.html import paragraph, tiles
from mimir_fast.evaluation.topics.examples import png
from mimir_fast.probing.attention_maps import Looks, looks_of
from mimir_fast.probing.picture import PICTURES, Mean, Numbers, Picture, View, coloured, grid_of

NONE = (
    "This encoder has no attention of all tokens among each other (attention inside of windows or between channels, or "
    "convolutions), or does not show it: no attention maps."
)
WHOSE = {"cls": "the cls token", "patches": "all patches, on average,"}


def look(view: View) -> tuple[Numbers, str]:
    """How far attention moves under attack, and the maps of a few images."""
    few, clean, attacked = view.shown
    before = looks_of(view.encoder, clean)
    num_patches = next((len(m[0]) for m in (before.cls, before.patches) if m is not None), 0)
    grid = grid_of(num_patches, *clean.shape[-2:])
    if not before or grid is None:
        return {"reason": NONE}, paragraph(NONE)
    after = Looks(None, None) if attacked is None else looks_of(view.encoder, attacked)
    rows = []
    for index, label in enumerate(few.labels.tolist()):
        cells = [(few.classes[label], png(clean[index]))]
        cells += [] if attacked is None else [("attacked", png(attacked[index]))]
        for name in WHOSE:
            maps = [getattr(one, name) for one in (before, after)]
            pair = [m[index].clamp_min(0).cpu() for m in maps if m is not None]
            most = max((float(m.max()) for m in pair), default=1.0) or 1.0
            captions = (name, f"{name}, attacked")
            cells += [(c, png(coloured(m.view(grid) / most))) for c, m in zip(captions, pair, strict=False)]
        rows.append(tiles(cells))
    moved = _moved(view)
    words = (
        "Attention of the last layer, the mean over its heads: bright patches are looked at most. An image and its "
        "attacked version share one scale."
    )
    parts = [paragraph(words, "soft")]
    parts += [
        paragraph(
            f"Under attack {WHOSE[name]} moves {100 * mean.value:.1f} % of its attention to other patches "
            f"({100 * mean.interval[0]:.1f} to {100 * mean.interval[1]:.1f}, {len(view.images)} images, {view.attack})."
        )
        for name, mean in moved.items()
    ]
    return {"moved": {name: mean.as_dict() for name, mean in moved.items()}}, "".join([*parts, *rows])


def _moved(view: View) -> dict[str, Mean]:
    """The share of the attention on patches that an attack moves to other patches: half the L1 distance."""
    found: dict[str, list[Tensor]] = {}
    for clean, attacked in view.pairs():
        before, after = looks_of(view.encoder, clean), looks_of(view.encoder, attacked)
        for name in WHOSE:
            a, b = getattr(before, name), getattr(after, name)
            if a is not None and b is not None:
                a, b = (m / m.abs().sum(dim=1, keepdim=True).clamp_min(1e-12) for m in (a, b))
                found.setdefault(name, []).append((a - b).abs().sum(dim=1).cpu() / 2)
    return {name: Mean.of(torch.cat(values)) for name, values in found.items()}


PICTURES.add("attention", Picture("attention", "Attention maps", look, order=10))
