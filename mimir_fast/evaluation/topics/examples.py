"""A few images, what the attack does to them, and what the model sees; click one to see the perturbation."""

import base64
import io
from collections.abc import Sequence
from dataclasses import asdict
from html import escape

import torch
from torch import Tensor, nn

from mimir_fast.attacks.lp import attack_classifier
from mimir_fast.attacks.pgd import predicted
from mimir_fast.evaluation.attacks import threat_of
from mimir_fast.evaluation.html import paragraph
from mimir_fast.evaluation.measure import Measurement, Records, Row
from mimir_fast.evaluation.topic import Numbers, Setup, Topic, register

SUITES = ("quick", "paper", "full", "strongest")
IMAGES, STEPS = 12, 20


def png(pixels: Tensor) -> str:
    """(C, H, W) in [0, 1] as the text of a PNG file in base64."""
    from PIL import Image

    levels = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    array = levels[0].numpy() if len(levels) == 1 else levels.permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _confidence(logits: Tensor) -> Tensor:
    """(B,) probability of the likeliest class, 0 where an answer is not finite."""
    return logits.softmax(dim=1).amax(dim=1).nan_to_num(nan=0.0)


def measurements(setup: Setup) -> list[Measurement]:
    """Pictures and predictions of a few images under PGD-20."""
    config = setup.config
    if config.suite not in SUITES:
        return []
    threat = threat_of(config, STEPS)

    def outcome(model: nn.Module, images: Tensor, labels: Tensor, samples: Tensor) -> Row:
        x = attack_classifier(model, images, labels, threat, samples=samples, seed=config.seed)
        with torch.no_grad():
            before, after = (model(pixels) for pixels in (images, x))
        delta = x - images
        largest = float(delta.abs().amax()) or 1.0
        return {
            "label": labels, "before": predicted(before), "after": predicted(after),
            "before_sure": _confidence(before), "after_sure": _confidence(after),
            "clean_png": [png(p) for p in images], "attacked_png": [png(p) for p in x],
            "delta_png": [png(0.5 + 0.5 * d / largest) for d in delta],
        }  # fmt: skip

    parameters = {**asdict(threat), "norm": config.norm, "seed": config.seed}
    return [Measurement("examples", outcome, parameters, setup.subset(IMAGES), cost=3.0 * STEPS)]


def summarize(setup: Setup, items: Sequence[Measurement], records: Records) -> Numbers | None:
    """One entry an image, those first that the attack broke."""
    if not items:
        return None
    rows = records.rows(items[0])
    entries = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    for entry in entries:
        for name in ("label", "before", "after"):
            entry[name] = setup.class_name(entry[name])
    entries.sort(key=lambda e: not (e["before"] == e["label"] != e["after"]))
    return {"images": entries, "eps_text": setup.config.eps_text}


def render(numbers: Numbers) -> str:
    """The attacked pictures; each unfolds into clean image, perturbation and attacked image."""
    parts = []
    for entry in numbers["images"]:
        broken = entry["after"] != entry["label"]
        words = f"{entry['label']}: seen as {entry['before']}, under attack as {entry['after']}"
        mark = "is-bad" if broken else "is-good"
        trio = "".join(
            f'<figure><img alt="{escape(alt)}" src="data:image/png;base64,{entry[name]}">'
            f"<figcaption>{escape(alt)}</figcaption></figure>"
            for name, alt in (
                ("clean_png", f"clean: {entry['before']}, {100 * entry['before_sure']:.0f} % confidence"),
                ("delta_png", "perturbation, magnified to full range"),
                ("attacked_png", f"attacked: {entry['after']}, {100 * entry['after_sure']:.0f} % confidence"),
            )
        )
        parts.append(
            f'<details><summary><img alt="{escape(words)}" src="data:image/png;base64,{entry["attacked_png"]}">'
            f'<span class="{mark}">{"misclassified" if broken else "correct"}</span>: {escape(entry["label"])}'
            f"{' → ' + escape(entry['after']) if broken else ''}</summary>"
            f'<div class="trio">{trio}</div></details>'
        )
    words = f"Attacked by PGD-{STEPS}, ε = {numbers['eps_text']}; click a picture to compare it with the clean one."
    return paragraph(words) + f'<div class="examples">{"".join(parts)}</div>'


register(Topic("examples", "Examples", measurements, summarize, render, 130))
