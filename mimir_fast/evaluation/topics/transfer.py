"""Images attacked on other models: gradient masking is no defence against them."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from mimir_fast.attacks.lp import attack_classifier
from mimir_fast.evaluation.attacks import make_pgd, threat_of
from mimir_fast.evaluation.html import paragraph, percent, span, table
from mimir_fast.evaluation.journal import fingerprint
from mimir_fast.evaluation.measure import Measurement, Records, Row, save_images, score
from mimir_fast.evaluation.topic import Numbers, Setup, Topic, options_of, register

STEPS = 20


@dataclass
class TransferOptions:
    """Models to attack in place of the evaluated one."""

    transfer_from: tuple[str, ...] = ()
    """Other models, named as for checkpoint: PGD-20 images made on them are shown to this model."""


def names_of(setup: Setup) -> tuple[str, ...]:
    """The other models, each once."""
    return tuple(dict.fromkeys(options_of(setup.config, TransferOptions).transfer_from))


def other_model(setup: Setup, spec: str) -> nn.Module:
    """One of them, loaded once."""
    return setup.once(f"model {spec}", lambda: setup.load_model(spec))


def check(setup: Setup) -> None:
    """Load every other model and look at its answers before anything is measured: they are part of the identity."""
    for spec in names_of(setup):
        try:
            other_model(setup, spec)
        except (ValueError, FileNotFoundError, ImportError) as error:
            reason = str(error).removeprefix(f"--checkpoint {spec}: ")
            raise type(error)(f"--transfer_from {spec}: {reason}") from error


def measurements(setup: Setup) -> list[Measurement]:
    """PGD-20 on each of the other models, scored by this one; within the ball, so what breaks here is not robust."""
    return [_attacked_on(setup, spec) for spec in names_of(setup)]


def _attacked_on(setup: Setup, spec: str) -> Measurement:
    # Named by the model and not by its place, so that others may come and go.
    config, name = setup.config, f"transfer_{fingerprint(spec)[:8]}"
    threat, keep = threat_of(config, STEPS), setup.keep(name)

    def outcome(model: nn.Module, images: Tensor, labels: Tensor, samples: Tensor) -> Row:
        other = other_model(setup, spec)
        x = attack_classifier(other, images, labels, threat, samples=samples, seed=config.seed)
        row = score(model, x, images, labels)
        if keep is not None:
            save_images(keep, x, labels, samples, row["prediction"])
        return row | {"source_correct": score(other, x, images, labels)["correct"]}

    parameters = {**make_pgd(config, STEPS, restarts=1).parameters, "from": spec}
    return Measurement(name, outcome, parameters, "all", f"PGD-{STEPS} on {spec}", 3.0 * STEPS, in_ball=True)


def summarize(setup: Setup, items: Sequence[Measurement], records: Records) -> Numbers | None:
    """Counts here and on the model the images were made on."""
    return {
        item.parameters["from"]: {
            **records.count(item).as_dict(),
            "source_accuracy": float(records.tensor(item, "source_correct").mean()),
        }
        for item in items
    } or None


def render(numbers: Numbers) -> str:
    """A table with one row an attacked model."""
    rows = [[s, percent(e["accuracy"]), span(e["interval"]), percent(e["source_accuracy"])] for s, e in numbers.items()]
    head = ["attacked model", "accuracy of this model", "95 % interval", "of the attacked one"]
    words = f"Images attacked by PGD-{STEPS} on another model within the ball, and shown to this one."
    return paragraph(words) + table(head, rows, numbers=(1, 2, 3))


register(Topic("transfer", "Attacks from other models", measurements, summarize, render, 60, TransferOptions, check))
