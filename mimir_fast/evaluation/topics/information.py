"""Mutual information of the attacked image and its code: the papers' bounds along ε, and an estimate.

The bounds tie disagreement to mutual information (MIMIR, arXiv 2312.04960, Propositions 3.2 and 3.3):

    H(F(x+δ)) − H_b(p_e) − p_e·log2(|F| − 1)  ≤  I(x+δ, z)  ≲  H(F(x_re)) − 2·p_e          in bits
    p_e = P( F(x+δ) ≠ F(x_re) )

F is the class the classifier sees, |F| the number of classes, z the code that the masked autoencoder has of the visible
patches of the attacked image x+δ, and x_re what it decodes from z. The left side is Fano's inequality. It bounds the
information of whatever x_re is made from: so no pixel of x+δ goes into x_re beside z, neither a visible patch nor the
mean and deviation of a masked one. It holds for the distribution of the images; entropy and p_e are estimated from N of
them, the entropy by the plug-in estimate, which is too small by about (classes seen − 1)/(2 N ln 2) bits. Where it is
below 0 it says nothing, and 0 is the bound. The right side assumes that no information is lost on the ways
x+δ → F(x+δ) and z → x_re; where it lies below the left side, it does not hold there.

The proof of Prop. 3.3 (Eq. 19) arrives at H(F(x+δ)) − 2·p_e, the proposition (Eq. 18) states H(F(x_re)) − 2·p_e: both
are computed. The estimate is of the same z; without a masked autoencoder there are no bounds, and z is the classifier's
features.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mimir_fast.attacks.lp import attack_classifier
from mimir_fast.attacks.pgd import NO_CLASS, predicted
from mimir_fast.evaluation.attacks import make_threat
from mimir_fast.evaluation.charts import Line, line_chart
from mimir_fast.evaluation.html import figure, figures, paragraph, table
from mimir_fast.evaluation.measure import Measurement, Records, Row
from mimir_fast.evaluation.options import radius_text
from mimir_fast.evaluation.topic import Numbers, Setup, Topic, register
from mimir_fast.evaluation.topics import curve
from mimir_fast.evaluation.topics.reconstruction import autoencoder_of, pretrained_of, reconstruct
from mimir_fast.ops.renyi_mi import renyi_mi
from mimir_fast.validation import check_number, counted

SUITES, STEPS = ("full",), 20


def entropy(labels: Tensor, num_classes: int) -> float:
    """Entropy in bits of the empirical distribution of (N,) int64 classes; 0 … log2(num_classes)."""
    p = torch.bincount(labels.long(), minlength=num_classes).double() / len(labels)
    return -float(torch.special.xlogy(p, p).sum()) / math.log(2) + 0.0


def binary_entropy(p: float) -> float:
    """H_b(p) in bits, 0 ≤ p ≤ 1."""
    return -sum(q * math.log2(q) for q in (p, 1 - p) if q > 0) + 0.0


def lower_bound(prediction_entropy: float, p_error: float, num_classes: int) -> float:
    """Bits that z must carry about x+δ if the classes differ with probability p_error; 0 where it says nothing.

    Raises:
        ValueError: p_error outside of [0, 1], or fewer than 2 classes.
    """
    check_number("p_error", p_error, at_least=0, at_most=1, hint="a probability")
    check_number("num_classes", num_classes, at_least=2)
    rest = p_error * math.log2(num_classes - 1) if num_classes > 2 else 0.0
    return max(0.0, prediction_entropy - binary_entropy(p_error) - rest)


@dataclass
class Bounds:
    """The bounds at one radius, bits.

    Attributes:
        p_error: part of the images whose class differs between the attacked image and its reconstruction.
        entropy: plug-in estimate of H(F(x+δ)).
        lower: Proposition 3.2.
        upper: Proposition 3.3 as stated, with H(F(x_re)).
        upper_of_proof: as its proof ends, with H(F(x+δ)).
    """

    p_error: float
    entropy: float
    lower: float
    upper: float
    upper_of_proof: float

    @property
    def crossed(self) -> bool:
        """The approximate upper bound lies below the certain lower one: its assumption fails here."""
        return self.upper < self.lower


def bounds_of(attacked: Tensor, reconstructed: Tensor, num_classes: int) -> Bounds:
    """Both bounds from the classes seen in attacked images and in their reconstructions, (N,) int64 each.

    No class (NO_CLASS) is one more.
    """
    if (both := torch.stack([attacked, reconstructed])).min() == NO_CLASS:
        (attacked, reconstructed), num_classes = both + 1, num_classes + 1
    p = float((attacked != reconstructed).double().mean())
    h, h_re = entropy(attacked, num_classes), entropy(reconstructed, num_classes)
    return Bounds(p, h, lower_bound(h, p, num_classes), h_re - 2 * p, h - 2 * p)


def measurements(setup: Setup) -> list[Measurement]:
    """At ε = 0 and along the curve: classes of attacked images and of their reconstructions, and a batch's estimate."""
    config = setup.config
    if config.suite not in SUITES or not (pretrained_of(setup) or setup.has_features):
        return []
    return [_at(setup, radius) for radius in (0.0, *curve.radii_of(config)) if radius <= 4 * config.eps]


def _at(setup: Setup, radius: float) -> Measurement:
    config, pretrained = setup.config, pretrained_of(setup)
    threat = make_threat(config.norm, radius, STEPS) if radius else None

    def outcome(model: nn.Module, images: Tensor, labels: Tensor, samples: Tensor) -> Row:
        x = images
        if threat is not None:
            x = attack_classifier(model, images, labels, threat, samples=samples, seed=config.seed)
        with torch.no_grad():
            row: Row = {"attacked": predicted(model(x))}
            if pretrained is not None:
                z, pictures = reconstruct(*autoencoder_of(setup, images.device), x, samples, config.seed)
                row["reconstructed"] = predicted(model(pictures))
            else:
                z = model.forward_features(x)  # type: ignore[operator]
            # One number a batch; an image alone in its batch shares nothing with anything.
            alone = len(x) < 2 or not bool(z.isfinite().all())
            row["renyi_bits"] = (x.new_tensor(torch.nan) if alone else renyi_mi(x, z.float())).expand(len(x))
        return row

    parameters = {"eps": radius, "num_steps": STEPS, "pretrained": pretrained, "seed": config.seed}
    name = curve.name_at("information", config, radius)
    return Measurement(name, outcome, parameters, curve.images_of(setup), cost=3.0 * STEPS)


def summarize(setup: Setup, items: Sequence[Measurement], records: Records) -> Numbers | None:
    """At each radius: the bounds where there is an autoencoder, and the estimate."""
    entries = []
    for item in items:
        entry: dict[str, Any] = {
            "eps": item.parameters["eps"], "label": radius_text(item.parameters["eps"], setup.config.norm)
        }  # fmt: skip
        rows = records.rows(item)
        if "reconstructed" in rows:
            attacked, reconstructed = (torch.tensor(rows[name]) for name in ("attacked", "reconstructed"))
            found = bounds_of(attacked, reconstructed, setup.num_classes)
            entry |= {**asdict(found), "crossed": found.crossed}
        if math.isfinite(bits := records.mean(item, "renyi_bits")):
            entry["renyi_bits"] = bits
        entries.append(entry)
    if not entries:
        return None
    trained = autoencoder_of(setup, torch.device("cpu"))[1] if pretrained_of(setup) else None
    return {"points": entries, "count": len(rows["attacked"]), "norm": setup.config.norm,
            "batch_size": setup.config.batch_size,
            "norm_pix_loss": trained is not None and trained.norm_pix_loss}  # fmt: skip


def render(numbers: Numbers) -> str:
    """What the bounds are, whether they cross, the figure and the numbers."""
    points, unit = numbers["points"], 255 if numbers["norm"] == "linf" else 1
    bounded = [p for p in points if "lower" in p]
    words = [
        "z is the code of the visible patches in the masked autoencoder."
        if bounded
        else "z is the classifier's features. The bounds of Propositions 3.2 and 3.3 need the masked autoencoder "
        "(--pretrained): they compare the class of an attacked image with that of its reconstruction.",
        "Estimate: matrix-based Rényi mutual information of order 2 between the attacked images and z, mean over "
        f"batches of {numbers['batch_size']}; it is no Shannon information, is not bound by the bounds, and cannot "
        "exceed the logarithm of the batch size.",
    ]
    if bounded:
        words.append(
            "Lower bound of I(x+δ, z): Proposition 3.2 (Fano's inequality), with x_re decoded from z alone. It is "
            f"computed from {counted(numbers['count'], 'image')}, with the plug-in estimate of the entropy H(F(x+δ)). "
            "Upper bound: Proposition 3.3, under the assumption that nothing is lost between the attacked image, its "
            "code, and the two classes."
        )
        if numbers.get("norm_pix_loss"):
            words.append(
                "The masked autoencoder predicts normalised patches (norm_pix_loss): z holds neither their means nor "
                "their deviations, and x_re gets the same ones everywhere. The lower bound may then be far below I."
            )
        crossed = [p["label"] for p in bounded if p["crossed"]]
        words.append(
            f"The upper bound lies BELOW the lower one at ε = {', '.join(crossed)}: the assumption behind it does not "
            "hold for this model there."
            if crossed
            else "The upper bound lies above the lower one at every ε here."
        )
    if not any(key in p for p in points for key in ("lower", "renyi_bits")):
        return "".join(map(paragraph, words))
    lines = [
        Line(name, [(unit * p["eps"], p[key]) for p in points if key in p])
        for name, key in (("lower bound", "lower"), ("upper bound, approximately", "upper"), ("estimate", "renyi_bits"))
    ]
    caption = f"Bits against ε, {counted(numbers['count'], 'image')}."
    ticks = [(unit * p["eps"], f"{unit * p['eps']:.4g}") for p in points]
    axis = "ε · 255" if unit == 255 else "ε"
    chart = line_chart(lines, caption, x_label=axis, y_label="bits", x_ticks=ticks, x_from=0.0)
    names = {
        "p_error": "p_e", "entropy": "H(F(x+δ)), estimated", "lower": "lower", "upper": "upper",
        "upper_of_proof": "upper, by its proof", "renyi_bits": "estimate",
    }  # fmt: skip
    keys = [key for key in names if any(key in p for p in points)]
    rows = [[p["label"], *(f"{p[key]:.3f}" if key in p else "" for key in keys)] for p in points]
    head = ["ε", *(names[key] for key in keys)]
    return (
        "".join(paragraph(text) for text in words)
        + figures(figure(chart, caption))
        + table(head, rows, numbers=range(1, len(head)))
    )


register(Topic("information", "Mutual information", measurements, summarize, render, 110))
