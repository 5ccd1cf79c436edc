"""Mutual information of the attacked image and the features: the papers' bounds along ε, and an estimate."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from mimir_fast.attacks.lp import attack_classifier
from mimir_fast.evaluation.attacks import make_threat
from mimir_fast.evaluation.charts import Line, line_chart
from mimir_fast.evaluation.config import radius_text
from mimir_fast.evaluation.html import figure, figures, paragraph, table
from mimir_fast.evaluation.measure import Helpers, Measurement, Records, Row
from mimir_fast.evaluation.mi_bounds import bounds_of
from mimir_fast.evaluation.plan import Setup
from mimir_fast.evaluation.reconstruction import reconstruct
from mimir_fast.evaluation.sections.reconstruction import AUTOENCODER
from mimir_fast.ops.renyi_mi import renyi_mi

NAME, TITLE = "information", "Mutual information"
STEPS = 20


def measurements(setup: Setup) -> list[Measurement]:
    """At ε = 0 and along the curve: classes of attacked images and of their reconstructions, and a batch's estimate."""
    config = setup.config
    if not config.settings.mi or not (config.pretrained or setup.has_features):
        return []
    radii = [0.0, *(r for r in setup.curve_radii() if r <= 4 * config.eps)]
    return [_at(setup, radius) for radius in radii]


def _at(setup: Setup, radius: float) -> Measurement:
    config = setup.config
    threat = make_threat(config.norm, radius, STEPS) if radius else None

    def outcome(model: nn.Module, images: Tensor, labels: Tensor, samples: Tensor, helpers: Helpers) -> Row:
        x = images
        if threat is not None:
            x = attack_classifier(model, images, labels, threat, samples=samples, seed=config.seed)
        with torch.no_grad():
            row: Row = {"attacked": model(x).argmax(dim=1)}
            if config.pretrained is not None:
                autoencoder, norm_pix = helpers[AUTOENCODER]
                pictures = reconstruct(autoencoder, x, samples, config.seed, norm_pix)
                row["reconstructed"] = model(pictures).argmax(dim=1)
            if setup.has_features:
                features = model.forward_features(x)  # type: ignore[operator]
                # One number a batch; an image alone in its batch shares nothing with anything.
                bits = renyi_mi(x, features.float()) if len(x) > 1 else torch.tensor(torch.nan)
                row["renyi_bits"] = bits.expand(len(x))
        return row

    parameters = {"eps": radius, "num_steps": STEPS, "pretrained": config.pretrained, "seed": config.seed}
    key = radius_text(radius, config.norm).replace("/", "_")
    return Measurement(f"information_{key}", outcome, parameters, setup.few, cost=3.0 * STEPS)


def summarize(setup: Setup, records: Records) -> dict[str, Any] | None:
    """One entry a radius."""
    entries = []
    for item in measurements(setup):
        entry: dict[str, Any] = {
            "eps": item.parameters["eps"], "label": radius_text(item.parameters["eps"], setup.config.norm)
        }  # fmt: skip
        rows = records.rows(item)
        if "reconstructed" in rows:
            found = bounds_of(
                torch.tensor(rows["attacked"]), torch.tensor(rows["reconstructed"]), setup.num_classes
            )  # fmt: skip
            entry |= {**asdict(found), "crossed": found.crossed}
        if "renyi_bits" in rows:
            entry["renyi_bits"] = float(records.tensor(item, "renyi_bits").nanmean())
        entries.append(entry)
    if not entries:
        return None
    return {"points": entries, "count": len(rows["attacked"]), "norm": setup.config.norm,
            "batch_size": setup.config.batch_size}  # fmt: skip


def render(numbers: dict[str, Any]) -> str:
    """What the bounds are, whether they cross, the figure and the numbers."""
    points, unit = numbers["points"], 255 if numbers["norm"] == "linf" else 1
    bounded = [p for p in points if "lower" in p]
    words = [
        "The matrix-based Rényi estimate of order 2 between the attacked images and their features, mean over batches "
        f"of {numbers['batch_size']}; it cannot exceed the logarithm of the batch size."
    ]
    if not bounded:
        words.append(
            "The bounds of Propositions 3.2 and 3.3 compare the class of an attacked image with that of its "
            "reconstruction: give the masked autoencoder (--pretrained) to see them."
        )
    else:
        words.append(
            "Lower bound: Proposition 3.2 (Fano's inequality, always true). Upper bound: Proposition 3.3, under the "
            "assumption that nothing is lost between the attacked image, its code, and the two classes."
        )
        crossed = [p["label"] for p in bounded if p["crossed"]]
        words.append(
            f"The upper bound lies BELOW the lower one at ε = {', '.join(crossed)}: the assumption behind it does not "
            "hold for this model there."
            if crossed
            else "The upper bound lies above the lower one at every ε here."
        )
    lines = [
        Line(name, [(unit * p["eps"], p[key]) for p in points if key in p])
        for name, key in (("lower bound", "lower"), ("upper bound, approximately", "upper"), ("estimate", "renyi_bits"))
    ]
    caption = f"Bits against ε, {numbers['count']} images."
    ticks = [(unit * p["eps"], f"{unit * p['eps']:.4g}") for p in points]
    axis = "ε · 255" if unit == 255 else "ε"
    chart = line_chart(lines, caption, x_label=axis, y_label="bits", x_ticks=ticks, x_from=0.0)
    names = {"p_error": "p_e", "lower": "lower", "upper": "upper", "upper_of_proof": "upper, by its proof",
             "renyi_bits": "estimate"}  # fmt: skip
    keys = [key for key in names if any(key in p for p in points)]
    rows = [[p["label"], *(f"{p[key]:.3f}" if key in p else "" for key in keys)] for p in points]
    head = ["ε", *(names[key] for key in keys)]
    return (
        "".join(paragraph(text) for text in words)
        + figures(figure(chart, caption))
        + table(head, rows, numbers=range(1, len(head)))
    )
