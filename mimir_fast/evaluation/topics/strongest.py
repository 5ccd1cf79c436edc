"""The strongest attacks: every image is attacked until it is broken, or all of them have tried.

Each attack is a measurement of its own, so that what counts for the robust accuracy is decided as everywhere: an attack
that ran on every image until it was broken is in it; one that time did not suffice for is counted apart, on the images
that it reached. One run makes all of them, attack after attack (sequence.py), with its progress in a file of its own.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from torch import Tensor, nn

from mimir_fast.attacks.lp import size_of
from mimir_fast.attacks.pgd import predicted
from mimir_fast.evaluation.attacks import NamedAttack
from mimir_fast.evaluation.html import paragraph, percent, span, table
from mimir_fast.evaluation.images import EvaluationImages
from mimir_fast.evaluation.journal import Journal, fingerprint
from mimir_fast.evaluation.measure import UNBROKEN, Measurement, Records, ShardRun, clean, save_images, scored
from mimir_fast.evaluation.options import CommonOptions
from mimir_fast.evaluation.sequence import Progress, run_in_sequence, taken
from mimir_fast.evaluation.statistics import Count
from mimir_fast.evaluation.strongest_attacks import (
    AROUND_OTHERS,
    FROM_OTHERS,
    NAMES,
    QUERYING,
    RESTARTS,
    STEPPING,
    TARGETED,
    Strength,
    from_package,
    needless,
    strongest_attacks,
    undefined,
)
from mimir_fast.evaluation.topic import Column, Numbers, Setup, Topic, options_of, register
from mimir_fast.evaluation.topics import transfer
from mimir_fast.validation import check_number, without

NAME = "strongest"


@dataclass
class StrongestOptions:
    """Whether the strongest attacks run, which, and for how long."""

    strongest: Literal["suite", "yes", "no"] = "suite"
    """The strongest attacks, the fastest first, on every image until it is broken; the suite of this name has them."""
    strongest_budget: float | None = None
    """Minutes these attacks may take, on each process; left out: until all have tried. What is missing is done by the
    same command with a larger one. Attacks that did not reach every image are counted apart."""
    strongest_attacks: tuple[str, ...] = ()
    """Only these of them: apgd-ce apgd-margin apgd-scaled apgd-probability apgd-nearest pgd-margin pgd-targets
    pgd-restarts apgd-targets fab-targets square rays hopskipjump mi-ensemble pgn-ensemble mi-lgv pgn-lgv; the last four
    need transfer_from, of which two transfer_lgv."""
    strongest_steps: int = 100
    """Gradient steps from one start at one target; PGD, also on other models, takes a fifth of them."""
    strongest_targets: int = 9
    """Likeliest wrong classes that targeted attacks aim at; there are as many as the model has classes, but one."""
    strongest_restarts: int = 5
    """Rounds of apgd-nearest; pgd-restarts has as many random starts at each target, apgd-targets a fifth."""
    strongest_queries: int = 5000
    """Images that Square may show to the model for each image; RayS and HopSkipJump have a fifth."""

    def __post_init__(self) -> None:
        for name in ("steps", "targets", "restarts", "queries"):
            check_number(f"strongest_{name}", getattr(self, f"strongest_{name}"), at_least=1)
        if self.strongest_budget is not None:
            check_number("strongest_budget", self.strongest_budget, above=0, hint="minutes; leave it out for no limit")
        if unknown := set(self.strongest_attacks) - set(NAMES):
            raise ValueError(f"--strongest_attacks: {sorted(unknown)} are none of {', '.join(NAMES)}")

    def idle(self) -> dict[str, str]:
        """Options that do nothing as the others are."""
        names = [f"strongest_{name}" for name in ("budget", "attacks", "steps", "targets", "restarts", "queries")]
        found = without(wanted(cast(CommonOptions, self)), "the strongest attacks do not run", *names)
        chosen = set(self.strongest_attacks or NAMES)
        for option, users in (
            ("steps", STEPPING), ("targets", TARGETED), ("restarts", tuple(RESTARTS)), ("queries", QUERYING)
        ):  # fmt: skip
            found |= without(
                chosen & set(users), f"--strongest_attacks has no {' or '.join(users)}", f"strongest_{option}"
            )
        return found


def wanted(config: CommonOptions) -> bool:
    """Whether they run: as asked, else as the suite does."""
    asked = options_of(config, StrongestOptions).strongest
    return config.suite == NAME if asked == "suite" else asked == "yes"


def missing(setup: Setup) -> dict[str, str]:
    """{attack: why} of those that could be asked for and do not run."""
    norm, asked = setup.config.norm, options_of(setup.config, StrongestOptions).strongest_attacks
    others, around = bool(transfer.names_of(setup)), bool(transfer.lgv_parameters(setup))
    found = undefined(norm, setup.num_classes, others=others, around=around)
    if asked:
        return {name: why for name, why in found.items() if name in asked}
    return needless(norm, setup.num_classes) | found


def check(setup: Setup) -> None:
    """Refuse attacks that were asked for by name and are not defined here."""
    if not wanted(setup.config):
        return
    named = options_of(setup.config, StrongestOptions).strongest_attacks
    for name, why in missing(setup).items():
        if name in named:
            raise ValueError(f"--strongest_attacks {name}: {why}")
    if any(from_package(attack.name, setup.config.norm) for attack in chosen(setup)):
        try:
            import pyautoattack  # noqa: F401
        except ImportError as error:
            raise ImportError(
                "Square of L2 balls and the attacks of L1 balls come from AutoAttack's package: pip install "
                "'pyautoattack<0.3', or name other attacks (--strongest_attacks)"
            ) from error


@dataclass(frozen=True)
class InSequence(Measurement):
    """One attack of the sequence; whichever runs first runs all, the others read what was found.

    Rows are of the images that the attack has reached: `correct` is 0 where it broke one that stood.
    """

    attack: str = ""
    setup: Setup | None = None

    def run(self, model: Any, shard: EvaluationImages, how: ShardRun) -> Journal:
        """Run, or go on with, the sequence on a shard, then write down what this attack did."""
        assert self.setup is not None
        progress = run_sequence(self.setup, model, shard, self._shared(how))
        journal, samples = Journal(how.path, how.settings), shard.samples[taken(len(shard), self.setup.config.seed)]
        start, stop = journal.num_images, progress.reached.get(self.attack, 0)
        if stop > start:
            right = [int(name != self.attack) for name in progress.broken_by[start:stop]]
            seconds = progress.seconds.get(self.attack, 0.0) - journal.seconds
            journal.append({"sample": samples[start:stop], "correct": right}, seconds)
        return journal

    def said(self, record: Journal) -> str:
        """For the log; most of the images it was spared, so there is no accuracy."""
        right = record.values.get("correct", [])
        return f"breaks {right.count(0)} of those left"

    def _shared(self, how: ShardRun) -> ShardRun:
        """The run of all attacks on the same shard."""
        settings = {key: value for key, value in (how.settings or {}).items() if key != "attack"}
        path = how.path and how.path.with_name(how.path.name.replace(self.file, NAME, 1)).with_suffix(".json")
        return replace(how, path=path, settings=settings)


def run_sequence(setup: Setup, model: Any, shard: EvaluationImages, how: ShardRun) -> Progress:
    """All attacks on a shard, or what is left of them; `how.path` is the file of their progress."""
    config, options = setup.config, options_of(setup.config, StrongestOptions)
    attacks, short = ({attack.name: attack for attack in found} for found in (chosen(setup), chosen(setup, short=True)))
    for name in attacks.keys() & set(AROUND_OTHERS):
        _others(setup, name)  # before any clock runs: collecting is no time of the attack

    def inside(x: Tensor, images: Tensor) -> Tensor:
        near = size_of(x - images, config.norm) <= config.eps * (1 + 1e-5)
        return near & (x >= 0).flatten(1).all(dim=1) & (x <= 1).flatten(1).all(dim=1)

    def keep(x: Tensor, labels: Tensor, samples: Tensor, attack: str) -> None:
        if (folder := setup.keep(f"{NAME}-{attack}")) is not None:
            save_images(folder, x, labels, samples, predicted(model(x)))

    parameters = {name: attack.parameters for name, attack in attacks.items()}
    return run_in_sequence(
        model, shard, {name: attack.run for name, attack in attacks.items()}, how,
        short={name: attack.run for name, attack in short.items()}, inside=inside,
        identity=fingerprint([how.settings, how.batch_size, parameters, len(shard)]), seed=config.seed,
        budget=None if options.strongest_budget is None else 60 * options.strongest_budget,
        order_file=how.path and how.path.with_name(f"{NAME}.order.json"),
        found=keep if config.save_adversarial else None,
    )  # fmt: skip


def chosen(setup: Setup, *, short: bool = False) -> list[NamedAttack]:
    """The attacks that run, or their short forms."""
    options = options_of(setup.config, StrongestOptions)
    strength = Strength(
        options.strongest_steps, options.strongest_targets, options.strongest_restarts, options.strongest_queries
    )
    strength = strength.short() if short else strength
    names = [name for name in options.strongest_attacks or NAMES if name not in missing(setup)]
    found = strongest_attacks(
        setup.config, strength, setup.num_classes, list(dict.fromkeys(names)),
        lambda name: _others(setup, name),
    )  # fmt: skip

    def sources(name: str) -> dict[str, Any]:
        around = {"lgv": transfer.lgv_parameters(setup)} if name in AROUND_OTHERS else {}
        return {"from": list(transfer.names_of(setup)), **around} if name in FROM_OTHERS else {}

    return [replace(attack, parameters=attack.parameters | sources(attack.name)) for attack in found]


def _others(setup: Setup, name: str) -> list[nn.Module]:
    """The models that an attack makes its images on."""
    specs = transfer.names_of(setup)
    if name in AROUND_OTHERS:
        return [model for spec in specs for model in transfer.collected(setup, spec)]
    return [transfer.other_model(setup, spec) for spec in specs]


def measurements(setup: Setup) -> list[Measurement]:
    """One for each attack, where they are wanted; the first does the work."""
    if not wanted(setup.config):
        return []
    attacks = chosen(setup)
    cost = 0.5 * sum(attack.cost for attack in attacks)  # about half of the images are broken on the way
    return [
        InSequence(
            f"{NAME}_{attack.name}", scored(clean), attack.parameters, "all", attack.label, 0.0 if number else cost,
            in_ball=True, attack=attack.name, setup=setup,
        )
        for number, attack in enumerate(attacks)
    ]  # fmt: skip


def states(records: Records) -> Iterator[Progress]:
    """The progress of each shard."""
    for number in range(records.num_shards):
        path = records.folder / f"{NAME}.{number}of{records.num_shards}.json"
        yield Progress(**json.loads(path.read_text()))


def summarize(setup: Setup, items: Sequence[Measurement], records: Records) -> Numbers | None:
    """What each attack did, over all shards, in the order they ran."""
    if not items:
        return None
    shards, rows = list(states(records)), list[dict[str, Any]]()
    order = shards[0].order or [item.name.removeprefix(f"{NAME}_") for item in items]
    labels = {item.name.removeprefix(f"{NAME}_"): item for item in items}
    for name in order:
        item = labels[name]
        total = {key: sum(getattr(s, key).get(name, 0) for s in shards) for key in ("faced", "reached", "seconds")}
        pilot = [(len(s.pilot[name]), s.pilot_seconds[name]) for s in shards if name in s.pilot]
        rows.append({
            "name": name, "label": item.label, "parameters": item.parameters, **total,
            "broken": sum(s.broken_by.count(name) for s in shards),
            "pilot": {"broken": sum(n for n, _ in pilot), "seconds": sum(spent for _, spent in pilot)},
        })  # fmt: skip
    images = [name for s in shards for name in s.broken_by]
    budget = options_of(setup.config, StrongestOptions).strongest_budget
    whole = all(row["reached"] == len(images) for row in rows)
    standing = [number >= min(s.reached.get(name, 0) for name in order) for s in shards for number in s.remaining()]
    faced_all = len(images) - sum(standing)
    numbers: Numbers = {
        **Count(sum(name == UNBROKEN for name in images), len(images)).as_dict(), "attacks": rows, "whole": whole,
        "complete": whole and _complete(setup, order), "faced_all": faced_all, "budget": budget,
        "left_out": missing(setup), "pilot_seconds": sum(row["pilot"]["seconds"] for row in rows),
    }  # fmt: skip
    if not whole:
        unfinished = [row["label"] for row in rows if row["reached"] < len(images)]
        numbers["notes"] = [
            f"Time was up ({budget:g} minutes) before the strongest attacks had tried every image: {faced_all} of "
            f"{len(images)} are broken or faced all. Not on every image, and so counted apart: {'; '.join(unfinished)}."
        ]
    return numbers


def _complete(setup: Setup, names: Sequence[str]) -> bool:
    """Whether all attacks that are defined here ran, and tried as long as they do where nothing else is asked for."""
    mine, usual = options_of(setup.config, StrongestOptions), StrongestOptions()
    lengths = [f"strongest_{name}" for name in ("steps", "targets", "restarts", "queries")]
    shorter = any(getattr(mine, name) < getattr(usual, name) for name in lengths)
    norm, classes = setup.config.norm, setup.num_classes
    spared = undefined(norm, classes, others=False, around=False) | needless(norm, classes)
    return not shorter and set(names) >= set(NAMES) - spared.keys()


def render(numbers: Numbers) -> str:
    """One row an attack, in their order, and what the table means."""
    total = numbers["total"]
    rows = [
        [row["label"], _rate(row["pilot"]), str(row["faced"]), str(row["broken"]), f"{row['seconds']:.0f} s",
         "all" if row["reached"] == total else f"{row['reached']} of {total}"]
        for row in numbers["attacks"]
    ]  # fmt: skip
    words = (
        "Each image is attacked until it is broken or all of these have tried. They stand in the order they ran in: "
        "first that whose short form broke most of a few images a second, then that which broke most of those it left, "
        f"and so on; finding that out took {numbers['pilot_seconds']:.0f} s."
    )
    interval = span(numbers["interval"])
    under = f"Correct under all of them: {percent(numbers['accuracy'])} (95 % interval {interval})."
    if not numbers["whole"]:
        under = (
            f"Time was up after {numbers['budget']:g} minutes: {numbers['faced_all']} of {total} images are broken or "
            "faced all of these. Attacks that reached every image count for the robust accuracy, the others apart, "
            "on the images that they reached."
        )
    out = dict[str, list[str]]()
    for name, why in numbers["left_out"].items():
        out.setdefault(why, []).append(name)
    notes = "".join(paragraph(f"Left out: {', '.join(names)}: {why}.", "soft") for why, names in out.items())
    head = ["attack", "breaks a second", "images faced", "broken", "time", "reached"]
    return paragraph(words) + table(head, rows, numbers=range(1, 6)) + paragraph(under) + notes


def _rate(pilot: dict[str, Any]) -> str:
    return f"{pilot['broken'] / pilot['seconds']:.3g}" if pilot["seconds"] > 0 else "—"


def columns(numbers: Numbers) -> list[Column]:
    """The accuracy under all of them, where all ran; in comparisons only where none was left out by name."""
    key = NAME if numbers["complete"] else ""
    return [Column(key, "strongest attacks", numbers["accuracy"])] if numbers["whole"] else []


register(
    Topic(NAME, "The strongest attacks", measurements, summarize, render, 25, StrongestOptions, check, columns=columns)
)
