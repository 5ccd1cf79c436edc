"""AutoAttack by its authors' package, resumable and spread over processes (evaluation/autoattack.py)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mimir_fast.evaluation.autoattack import ATTACKS, STANDING, run_autoattack, square_warning
from mimir_fast.evaluation.config import EvaluateConfig
from mimir_fast.evaluation.html import paragraph, percent, span, table
from mimir_fast.evaluation.images import EvaluationImages
from mimir_fast.evaluation.measure import Count, Journal, Measurement, Place, Records, save_images, under
from mimir_fast.evaluation.measure import clean as no_attack
from mimir_fast.evaluation.plan import Setup

NAME, TITLE = "autoattack", "AutoAttack"


@dataclass(frozen=True)
class AutoAttack(Measurement):
    """The measurement: progress in a file of its own, and one row an image at the end."""

    config: EvaluateConfig | None = None
    setup: Setup | None = None

    def run(self, model: nn.Module, shard: EvaluationImages, place: Place) -> Journal:
        """Run, or go on with, AutoAttack on a shard."""
        config, setup = self.config, self.setup
        assert config is not None and setup is not None

        def keep(x: Tensor, labels: Tensor, samples: Tensor, attack: str) -> None:
            folder = setup.keep(f"autoattack-{attack}")
            if folder is not None:
                with torch.no_grad():
                    save_images(folder, x, labels, samples, model(x).argmax(dim=1))

        progress = run_autoattack(
            model, shard, config.eps, batch_size=place.batch_size, device=place.device,
            state=place.path.with_suffix(".json"), seed=config.seed, version=config.autoattack_version,
            attacks=config.autoattack_attacks or None, norm=config.norm, settings=place.settings, say=place.say,
            tick=lambda share: place.tick(share * len(shard)), keep=keep if config.save_adversarial else None,
        )  # fmt: skip
        journal = Journal(place.path, place.settings)
        if journal.num_images < len(shard):
            names = progress.broken_by
            row = {"sample": shard.samples, "correct": [int(n == STANDING) for n in names], "broken_by": names}
            journal.append(row, sum(progress.seconds.values()))
        return journal


def is_whole(config: EvaluateConfig) -> bool:
    """Whether all of the version's attacks run, so that the result may bear its name."""
    chosen = config.autoattack_attacks or ATTACKS[config.autoattack_version]
    return set(chosen) == set(ATTACKS[config.autoattack_version])


def title_of(config: EvaluateConfig) -> str:
    """What the result may be called."""
    if is_whole(config):
        return "AutoAttack" + ("" if config.autoattack_version == "standard" else f" {config.autoattack_version}")
    return " + ".join(name.upper() for name in config.autoattack_attacks)


def measurement(setup: Setup) -> AutoAttack:
    """The one measurement."""
    config = setup.config
    few = config.autoattack_images
    images = f"few:{few}" if few is not None and few < setup.num_images else "all"
    names = config.autoattack_attacks or ATTACKS[config.autoattack_version]
    parameters = {
        "norm": config.norm, "eps": config.eps, "version": config.autoattack_version, "attacks": list(names),
        "seed": config.seed,
    }  # fmt: skip
    # Passes on images that stand until the end; half of them do not, in a robust model.
    cost = 0.5 * sum({"apgd-ce": 300, "apgd-t": 2700, "fab-t": 5000, "square": 5000}.get(name, 300) for name in names)
    return AutoAttack(
        "autoattack", under(no_attack), parameters, images, title_of(config), cost, True, config, setup
    )  # fmt: skip


def measurements(setup: Setup) -> list[Measurement]:
    """AutoAttack, where it is wanted."""
    return [measurement(setup)] if setup.config.wants_autoattack else []


def summarize(setup: Setup, records: Records) -> dict[str, Any] | None:
    """Counts after each stage, over all shards."""
    if not setup.config.wants_autoattack:
        return None
    item = measurement(setup)
    states = list(records.states(item))
    broken = records.rows(item)["broken_by"]
    stages = ["clean", *item.parameters["attacks"]]
    reached = [stage for stage in stages if any(stage in state["after"] for state in states)]
    after, standing = {}, len(broken)
    for stage in reached:
        standing -= sum(name == stage for name in broken)
        after[stage] = standing
    # Each shard has checked its own counts: the share that Square took is one of all images.
    said = {w for state in states for w in state["warnings"] if not w.startswith("Square Attack has decreased")}
    return {
        "title": item.label,
        "whole": is_whole(setup.config),
        "version": setup.config.autoattack_version,
        **Count(standing, len(broken)).as_dict(),
        "after": after,
        "seconds": {s: sum(state["seconds"].get(s, 0.0) for state in states) for s in reached if s != "clean"},
        "warnings": sorted(said) + square_warning(after, len(broken)),
        "images": setup.num_images,
        "parameters": item.parameters,
    }


def render(numbers: dict[str, Any]) -> str:
    """Counts after each attack."""
    rows = [
        [name, percent(count / numbers["total"]), f"{count}/{numbers['total']}",
         f"{numbers['seconds'].get(name, 0):.0f} s"]
        for name, count in numbers["after"].items()
    ]  # fmt: skip
    words = (
        f"{numbers['title']}, version {numbers['version']}, fp32, by its authors' package; each attack runs on "
        f"the images that the ones before did not break. Robust accuracy: {percent(numbers['accuracy'])} "
        f"(95 % interval {span(numbers['interval'])})."
    )
    if numbers["total"] < numbers["images"]:
        words += f" On {numbers['total']} of the {numbers['images']} images, evenly spaced."
    notes = "".join(paragraph(text, "note") for text in numbers["warnings"])
    return paragraph(words) + table(["after", "accuracy", "still correct", "time"], rows, numbers=range(1, 4)) + notes
