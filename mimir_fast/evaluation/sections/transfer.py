"""Images attacked on other models: gradient masking is no defence against them."""

from typing import Any

from torch import Tensor, nn

from mimir_fast.attacks.lp import attack_classifier
from mimir_fast.evaluation.attacks import make_pgd, make_threat
from mimir_fast.evaluation.html import paragraph, percent, span, table
from mimir_fast.evaluation.measure import Helpers, Measurement, Records, Row, look, save_images
from mimir_fast.evaluation.plan import Setup

NAME, TITLE = "transfer", "Attacks from other models"
STEPS = 20


def measurements(setup: Setup) -> list[Measurement]:
    """PGD-20 on each of the other models, looked at by this one; within the ball, so what breaks here is not robust."""
    return [_from(setup, spec, number) for number, spec in enumerate(setup.config.transfer_from)]


def _from(setup: Setup, spec: str, number: int) -> Measurement:
    config, name = setup.config, f"transfer_{number}"
    threat, keep = make_threat(config.norm, config.eps, STEPS, config.alpha), setup.keep(name)

    def outcome(model: nn.Module, images: Tensor, labels: Tensor, samples: Tensor, helpers: Helpers) -> Row:
        other = helpers[spec]
        x = attack_classifier(other, images, labels, threat, samples=samples, seed=config.seed)
        row = look(model, x, images, labels)
        if keep is not None:
            save_images(keep, x, labels, samples, row["prediction"])
        return row | {"source_correct": look(other, x, images, labels)["correct"]}

    parameters = {**make_pgd(config, STEPS, restarts=1).parameters, "from": spec}
    return Measurement(name, outcome, parameters, "all", f"PGD-{STEPS} on {spec}", 3.0 * STEPS, breaks=True)


def summarize(setup: Setup, records: Records) -> dict[str, Any] | None:
    """Counts here and on the model the images were made on."""
    items = measurements(setup)
    return {
        item.parameters["from"]: {
            **records.count(item).as_dict(),
            "source_accuracy": float(records.tensor(item, "source_correct").mean()),
        }
        for item in items
    } or None


def render(numbers: dict[str, Any]) -> str:
    """The table."""
    rows = [[s, percent(e["accuracy"]), span(e["interval"]), percent(e["source_accuracy"])] for s, e in numbers.items()]
    head = ["attacked model", "accuracy of this model", "95 % interval", "of the attacked one"]
    words = f"Images attacked by PGD-{STEPS} on another model within the ball, and shown to this one."
    return paragraph(words) + table(head, rows, numbers=(1, 2, 3))
