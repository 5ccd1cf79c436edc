"""How far an attack moves what each layer says of an image: relative L2 distance and cosine, layer by layer.

‖z(x+δ) − z(x)‖ / ‖z(x)‖        cos( z(x+δ), z(x) )          z: all tokens of a layer in one vector
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mimir_fast.evaluation.charts import Line, line_chart
from mimir_fast.evaluation.html import figure, figures, paragraph
from mimir_fast.layers.outputs import outputs_of
from mimir_fast.probing.picture import PICTURES, Mean, Numbers, Picture, View

AXES = {"relative_l2": "relative L2 distance", "cosine": "cosine"}


def look(view: View) -> tuple[Numbers, str] | None:
    """Both measures of each layer and of the pooled vector; None without attack."""
    found: dict[str, dict[str, list[Tensor]]] = {}
    with torch.no_grad():
        for pair in view.pairs():
            before, after = (_vectors(view, images) for images in pair)
            for name, z in before.items():
                values = found.setdefault(name, {axis: [] for axis in AXES})
                values["relative_l2"].append(((after[name] - z).norm(dim=1) / z.norm(dim=1).clamp_min(1e-12)).cpu())
                values["cosine"].append(F.cosine_similarity(after[name], z, dim=1).cpu())
    if not found:
        return None
    layers = [
        {"layer": name, **{axis: Mean.of(torch.cat(parts)).as_dict() for axis, parts in values.items()}}
        for name, values in found.items()
    ]
    numbers: Numbers = {"layers": layers, "images": len(view.images), "attack": view.attack}
    words = f"Clean images against the same under attack, {len(view.images)} of them ({view.attack})."
    return numbers, paragraph(words, "soft") + charts([(view.name, numbers)])


def _vectors(view: View, images: Tensor) -> dict[str, Tensor]:
    with outputs_of(view.encoder.layers) as outputs:
        pooled = view.encoder(images)
    return {name: z.flatten(1).float() for name, z in {**outputs, "pooled": pooled}.items()}


def charts(models: Sequence[tuple[str, Numbers]]) -> str:
    """A curve a model, from the first layer (left) to the pooled vector (right), whatever their depths."""
    shown = []
    for axis, label in AXES.items():
        lines: list[Line] = []
        ticks: dict[float, str] = {}
        for name, numbers in models:
            layers = numbers["layers"]
            places = [index / max(len(layers) - 1, 1) for index in range(len(layers))]
            points = [(x, layer[axis]["mean"]) for x, layer in zip(places, layers, strict=True)]
            lines.append(Line(name, points, [tuple(layer[axis]["interval"]) for layer in layers]))
            ticks |= {x: layer["layer"] for x, layer in zip(places, layers, strict=True)}
        words = f"{label} of clean and attacked images by layer"
        known = sorted(ticks.items()) if len(models) == 1 else [(0.0, "first layer"), (1.0, "pooled")]
        chart = line_chart(lines, words, x_label="layer", y_label=label, x_ticks=known)
        shown.append(figure(chart, f"{words}, mean over images with its 95 % interval."))
    return figures(*shown)


PICTURES.add("distance", Picture("distance", "Distance under attack, layer by layer", look, charts, 30))
