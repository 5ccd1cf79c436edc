"""Images attacked on other models, and on models that LGV collects around these: no masked gradient helps there."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from mimir_fast.attacks.lgv import collect
from mimir_fast.attacks.lp import attack_classifier
from mimir_fast.attacks.momentum import momentum_ensemble
from mimir_fast.data.sources import build_source
from mimir_fast.evaluation.attacks import make_pgd, make_threat, parameters_of, threat_of
from mimir_fast.evaluation.html import paragraph, percent, span, table
from mimir_fast.evaluation.journal import fingerprint
from mimir_fast.evaluation.measure import Attack, Measurement, Records, Row, save_images, score
from mimir_fast.evaluation.surrogates import AN_EPOCH, lgv_models
from mimir_fast.evaluation.topic import Numbers, Setup, Topic, options_of, register
from mimir_fast.validation import check_number, without

STEPS, LGV_STEPS = 20, 50


@dataclass
class TransferOptions:
    """Models to attack in place of the evaluated one."""

    transfer_from: tuple[str, ...] = ()
    """Other models, named as for checkpoint: PGD-20 images made on them are shown to this model."""
    transfer_lgv: int = 0
    """Epochs of SGD at a constant high learning rate, on the training split, from each of the other models: the four
    models passed in each are attacked together (LGV), which fools unseen models more often. The paper takes 10; 0: not
    at all. Needs the data set's training images, and room for the models in output_dir."""
    transfer_lgv_lr: float = 0.05
    """Its learning rate: 0.05 suits a ResNet-50; a higher one reaches further, until the models forget their task."""

    def __post_init__(self) -> None:
        check_number("transfer_lgv", self.transfer_lgv, at_least=0, hint="epochs")
        check_number("transfer_lgv_lr", self.transfer_lgv_lr, above=0, hint="a learning rate")

    def idle(self) -> dict[str, str]:
        """Options that do nothing as the others are."""
        return {
            **without(self.transfer_from, "--transfer_from names no other model", "transfer_lgv", "transfer_lgv_lr"),
            **without(self.transfer_lgv, "--transfer_lgv is 0", "transfer_lgv_lr"),
        }


def names_of(setup: Setup) -> tuple[str, ...]:
    """The other models, each once."""
    return tuple(dict.fromkeys(options_of(setup.config, TransferOptions).transfer_from))


def other_model(setup: Setup, spec: str) -> nn.Module:
    """One of them, loaded once."""
    return setup.once(f"model {spec}", lambda: setup.load_model(spec))


def lgv_parameters(setup: Setup) -> dict[str, Any]:
    """How models are collected; {} where none are."""
    options, config = options_of(setup.config, TransferOptions), setup.config
    if not (options.transfer_from and options.transfer_lgv):
        return {}
    lr, epochs = options.transfer_lgv_lr, options.transfer_lgv
    return {"epochs": epochs, "models": AN_EPOCH * epochs, "lr": lr, "seed": config.seed, "data": config.data.source}


def collected(setup: Setup, spec: str) -> list[nn.Module]:
    """The models around one of the others, collected or read once."""
    how = lgv_parameters(setup)
    folder = setup.config.folder / "surrogates" / fingerprint([spec, how])
    data = replace(setup.config.data, limit=None)
    epochs, lr, seed = how["epochs"], how["lr"], how["seed"]
    return setup.once(
        f"LGV {spec}", lambda: lgv_models(other_model(setup, spec), folder, data, epochs=epochs, lr=lr, seed=seed)
    )


def check(setup: Setup) -> None:
    """Load every other model and look at its answers before anything is measured: they are part of the identity. Where
    models are to be collected around them, look for training images and take a step."""
    lgv = lgv_parameters(setup)
    for spec in names_of(setup):
        try:
            other = other_model(setup, spec)
            if lgv and setup.trial is not None:
                few = setup.trial.shard("all", 0)
                device = next((p.device for p in other.parameters()), few.images.device)
                step = [(x, y) for x, y, _ in few.batches(len(few), device)]
                collect(other, step, count=1, every=1, lr=lgv["lr"])
        except (ValueError, FileNotFoundError, ImportError) as error:
            reason = str(error).removeprefix(f"--checkpoint {spec}: ")
            raise type(error)(f"--transfer_from {spec}: {reason}") from error
    if lgv:
        try:
            build_source(replace(setup.config.data, limit=None), "train")
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"--transfer_lgv needs training images: {error}") from error


def measurements(setup: Setup) -> list[Measurement]:
    """PGD-20 on each of the other models, and I-FGSM on those around it, scored by the evaluated one; within the ball,
    so what breaks here is not robust."""
    config, lgv, found = setup.config, lgv_parameters(setup), list[Measurement]()
    threat, seed = threat_of(config, STEPS), config.seed
    far = make_threat(config.norm, config.eps, LGV_STEPS, config.eps / 10)

    def of(spec: str) -> Attack:
        def attack(model: nn.Module, x: Tensor, y: Tensor, samples: Tensor) -> Tensor:
            return attack_classifier(other_model(setup, spec), x, y, threat, samples=samples, seed=seed)

        return attack

    def around(spec: str) -> Attack:
        def attack(model: nn.Module, x: Tensor, y: Tensor, samples: Tensor) -> Tensor:
            return momentum_ensemble(
                collected(setup, spec), x, y, far, decay=0.0, together=1, samples=samples, seed=seed
            )  # fmt: skip

        return attack

    for spec in names_of(setup):
        # Named by the model and not by its place, so that others may come and go.
        name, parameters = f"transfer_{fingerprint(spec)[:8]}", make_pgd(config, STEPS, restarts=1).parameters
        found.append(_shown(setup, spec, name, of(spec), f"PGD-{STEPS} on {spec}", parameters))
        if lgv:
            parameters = {**parameters_of(far, adaptive=False), "random_start": False, "lgv": lgv}
            label = f"LGV-{LGV_STEPS} on {lgv['models']} models around {spec}"
            found.append(_shown(setup, spec, f"{name}_lgv", around(spec), label, parameters))
    return found


def _shown(
    setup: Setup, spec: str, name: str, attack: Attack, label: str, parameters: dict[str, Any]
) -> Measurement:  # fmt: skip
    keep = setup.keep(name)

    def outcome(model: nn.Module, images: Tensor, labels: Tensor, samples: Tensor) -> Row:
        x = attack(model, images, labels, samples)
        row = score(model, x, images, labels)
        if keep is not None:
            save_images(keep, x, labels, samples, row["prediction"])
        return row | {"source_correct": score(other_model(setup, spec), x, images, labels)["correct"]}

    cost = 3.0 * parameters["num_steps"]
    return Measurement(name, outcome, {**parameters, "from": spec}, "all", label, cost, in_ball=True)


def summarize(setup: Setup, items: Sequence[Measurement], records: Records) -> Numbers | None:
    """Counts here and on the model the images were made on, or around."""
    return {
        item.parameters["from"] + (" (LGV)" if "lgv" in item.parameters else ""): {
            **records.count(item).as_dict(), "label": item.label,
            "source_accuracy": float(records.tensor(item, "source_correct").mean()),
        }
        for item in items
    } or None  # fmt: skip


def render(numbers: Numbers) -> str:
    """A table with one row an attack."""
    rows = [
        [e["label"], percent(e["accuracy"]), span(e["interval"]), percent(e["source_accuracy"])]
        for e in numbers.values()
    ]
    head = ["attack", "accuracy of this model", "95 % interval", "of the other one"]
    words = "Images attacked on another model within the ball, and shown to this one."
    if any("LGV" in e["label"] for e in numbers.values()):
        words += (
            " LGV (Gubri et al., arXiv 2207.13129) attacks models that SGD at a high learning rate passes around it."
        )
    return paragraph(words) + table(head, rows, numbers=(1, 2, 3))


register(Topic("transfer", "Attacks from other models", measurements, summarize, render, 60, TransferOptions, check))
