"""The attack on the masked autoencoder's reconstruction, where one is given (evaluation/reconstruction.py)."""

from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from mimir_fast.attacks.adaptive import attack_reconstruction
from mimir_fast.attacks.threat_model import LinfThreat
from mimir_fast.evaluation.attacks import step_size
from mimir_fast.evaluation.html import paragraph, table
from mimir_fast.evaluation.measure import Helpers, Measurement, Records, Row
from mimir_fast.evaluation.plan import Setup
from mimir_fast.evaluation.reconstruction import MASK_RATIO

NAME, TITLE = "reconstruction", "Reconstruction"
STEPS, IMAGES = 20, 256
AUTOENCODER = "autoencoder"
"""Name of the helper: (masked autoencoder, whether it predicts normalised patches)."""


def measurements(setup: Setup) -> list[Measurement]:
    """Errors on the masked patches when the visible ones are clean, noisy and attacked."""
    config = setup.config
    if config.pretrained is None:
        return []
    eps = config.eps if config.norm == "linf" else 8 / 255  # the pre-training attack is an L∞ one
    threat = LinfThreat(eps=eps, alpha=step_size(eps, STEPS), num_steps=STEPS)

    def outcome(model: nn.Module, images: Tensor, labels: Tensor, samples: Tensor, helpers: Helpers) -> Row:
        autoencoder, norm_pix = helpers[AUTOENCODER]
        errors = attack_reconstruction(
            autoencoder, images, threat, mask_ratio=MASK_RATIO, norm_pix=norm_pix, samples=samples, seed=config.seed
        )
        return {"clean": errors.clean, "random": errors.random, "attacked": errors.attacked}

    parameters = {**asdict(threat), "mask_ratio": MASK_RATIO, "pretrained": config.pretrained, "seed": config.seed}
    few = f"few:{min(IMAGES, setup.num_images)}"
    return [Measurement("reconstruction", outcome, parameters, few, cost=3.0 * STEPS)]


def summarize(setup: Setup, records: Records) -> dict[str, Any] | None:
    """Means over the images."""
    items = measurements(setup)
    if not items:
        return None
    values = {name: records.tensor(items[0], name) for name in ("clean", "random", "attacked")}
    return {
        **{name: float(value.mean()) for name, value in values.items()},
        "worse_than_noise": float((values["attacked"] > values["random"]).double().mean()),
        "num_images": len(values["clean"]),
        "parameters": items[0].parameters,
    }


def render(numbers: dict[str, Any]) -> str:
    """The table."""
    rows = [
        [words, f"{numbers[name]:.4f}", f"{numbers[name] / max(numbers['clean'], 1e-12):.2f} ×"]
        for name, words in (("clean", "clean"), ("random", "random noise"), ("attacked", "attacked"))
    ]
    said = (
        f"Error of the masked autoencoder on masked patches of {numbers['num_images']} images, when the visible ones "
        f"are perturbed; the attack beats noise on {100 * numbers['worse_than_noise']:.0f} % of them."
    )
    return paragraph(said) + table(["visible patches", "mean squared error", "relative"], rows, numbers=(1, 2))
