"""AutoAttack, with progress on disk after every batch.

The four attacks of *standard* run one after the other, each on the images that the ones before did not break (Croce &
Hein, arXiv 2003.01690). The settings are those of its authors' package, `pyautoattack`. The attacks of L∞ balls, and of
L2 balls but for Square, are ours: an image leaves when it is broken, and the rest are packed into full batches
(`evaluation/waves.py`). Their numbers equal the package's in law. With `--autoattack_exact` all attacks are the
package's objects on the package's batches, and the numbers equal those of a direct call with the same images, batch
size and seed, image by image. Either way the loop around them is ours, because the package saves nothing within an
attack, and an attack on 10,000 images takes hours; a kill changes nothing.

Shapes: N images, C channels, H × W pixels.
"""

import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from mimir_fast.attacks.pgd import is_correct, predicted
from mimir_fast.evaluation.attack_progress import AttackProgress
from mimir_fast.evaluation.html import paragraph, percent, span, table
from mimir_fast.evaluation.images import EvaluationImages
from mimir_fast.evaluation.journal import Journal, fingerprint
from mimir_fast.evaluation.measure import (
    UNBROKEN,
    Measurement,
    Records,
    ShardRun,
    clean,
    save_images,
    scored,
    strict_fp32,
)  # fmt: skip
from mimir_fast.evaluation.options import CommonOptions, Norm
from mimir_fast.evaluation.package import (
    batches,
    check_model,
    listening,
    package_of,
    prepared,
    require_package,
)  # fmt: skip
from mimir_fast.evaluation.statistics import LEVEL, binomial_tail, odd_p
from mimir_fast.evaluation.topic import Column, Numbers, Setup, Topic, options_of, register
from mimir_fast.evaluation.waves import Waves, has_waves
from mimir_fast.layers.borrowing import borrowed
from mimir_fast.validation import check_number, without

NAME = "autoattack"
SUITES = ("paper", "full", "table")
Version = Literal["standard", "plus", "rand"]
ATTACKS: dict[str, tuple[str, ...]] = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
FEW_CLASSES: dict[int, dict[Version, tuple[str, ...]]] = {
    2: {"standard": ("apgd-ce", "fab", "square"), "plus": ("apgd-ce", "fab", "square"), "rand": ("apgd-ce",)},
    3: {"standard": ("apgd-ce", "apgd-dlr", "fab", "fab-t", "square"),
        "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "fab-t")},
}  # fmt: skip
"""A version's attacks as far as they are defined: the DLR loss compares three logits, its targeted form four. Of two
classes FAB has one target, whether it is targeted or not."""
PASSES = {"apgd-ce": 300, "apgd-dlr": 300, "apgd-t": 2700, "fab-t": 3600, "fab": 12000, "square": 5000}
"""Passes through the model of an attack on an image that it does not break, roughly; a gradient is two more."""
BY = {
    "pyautoattack": "by its authors' package",
    "mimir_fast": "with the settings of its authors' package, broken images leave at once",
}
SQUARE_FINDS = 0.002
"""Share of the images beyond which the package warns that Square found what gradients missed."""
OTHER = "another evaluation (other model, images, eps, batch size, seed or version)"
_LOG = logging.getLogger(__name__)


@dataclass
class AutoAttackOptions:
    """Whether and how AutoAttack runs."""

    autoattack: Literal["suite", "yes", "no"] = "suite"
    """Run AutoAttack as the suite says, or not."""
    autoattack_version: Version = "standard"
    """`rand` for models that are not deterministic."""
    autoattack_images: int | None = None
    """Run AutoAttack on that many of the images, evenly spaced; left out: on all."""
    autoattack_attacks: tuple[str, ...] = ()
    """Only these of its attacks, such as apgd-ce apgd-t; the result is then not called AutoAttack."""
    autoattack_exact: bool = False
    """Run the authors' package, image by image as a direct call does; else broken images leave at once and the others
    fill the batches, which is faster, and equal in law."""

    def __post_init__(self) -> None:
        if self.autoattack_images is not None:
            check_number("autoattack_images", self.autoattack_images, at_least=1, hint="or give --autoattack no")
        if unknown := set(self.autoattack_attacks) - set(known := ATTACKS[self.autoattack_version]):
            raise ValueError(f"--autoattack_attacks: {sorted(unknown)} are none of {', '.join(sorted(known))}")

    def idle(self) -> dict[str, str]:
        """Options that do nothing as the others are."""
        return without(
            wanted(cast(CommonOptions, self)),
            "AutoAttack does not run",
            "autoattack_version",
            "autoattack_images",
            "autoattack_attacks",
            "autoattack_exact",
        )

    def chosen_attacks(self, num_classes: int) -> tuple[str, ...]:
        """The attacks that run, in their order."""
        return self.autoattack_attacks or attacks_of(self.autoattack_version, num_classes)

    def whole(self, num_classes: int) -> bool:
        """Whether all of the version's attacks run, so that the result may bear its name."""
        return set(self.chosen_attacks(num_classes)) >= set(attacks_of(self.autoattack_version, num_classes))

    def title(self, num_classes: int) -> str:
        """What the result may be called."""
        names, version = self.chosen_attacks(num_classes), self.autoattack_version
        if not self.whole(num_classes):
            return " + ".join(name.upper() for name in names)
        title = "AutoAttack" + ("" if version == "standard" else f" {version}")
        return title if names == ATTACKS[version] else f"{title} for {num_classes} classes"


def wanted(config: CommonOptions) -> bool:
    """Whether AutoAttack runs: as asked, else as the suite does."""
    asked = options_of(config, AutoAttackOptions).autoattack
    return config.suite in SUITES if asked == "suite" else asked == "yes"


def attacks_of(version: Version, num_classes: int) -> tuple[str, ...]:
    """The attacks of a version, of few classes as far as they are defined."""
    return FEW_CLASSES.get(num_classes, {}).get(version, ATTACKS[version])


def require_classes(count: int, attacks: Sequence[str]) -> None:
    """Refuse fewer classes than an attack needs (ValueError): only those on the DLR loss need some."""
    least = {"apgd-t": 4, "apgd-dlr": 3}  # its two losses compare so many of the largest logits
    if unfit := [name for name in attacks if count < least.get(name, 2)]:
        rest = " ".join(name for name in attacks if name not in unfit)
        raise ValueError(
            f"AutoAttack's {unfit[0]} compares the {least.get(unfit[0], 2)} largest logits, and there are {count} "
            f"classes: leave it out{f', as --autoattack_attacks {rest}' if rest else ', with --autoattack no'}"
        )


@dataclass
class Progress(AttackProgress):
    """`batch` counts attempts where an attack runs in waves (`waves.Waves.run`).

    Attributes:
        after: accuracy count after each finished stage, `clean` first.
        warnings: what the package's own checks found.
    """

    after: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def run_autoattack(
    model: nn.Module, shard: EvaluationImages, eps: float, *, batch_size: int, device: torch.device,
    state: Path | None = None, seed: int = 0, version: Version = "standard", attacks: Sequence[str] | None = None,
    norm: Norm = "linf", settings: Any = None, exact: bool = False, log: Callable[[str], None] = _LOG.info,
    tick: Callable[[float], None] = lambda share: None,
    keep: Callable[[Tensor, Tensor, Tensor, str], None] | None = None,
) -> Progress:  # fmt: skip
    """AutoAttack on a shard, in fp32.

    Args:
        model: takes images in [0, 1], returns logits; parameters' gradients and global random state are left alone.
        eps: radius in units of [0, 1].
        state: JSON file of the progress; goes on where it ends.
        seed: the package seeds each batch of each attack with it.
        version: `standard`, `plus`, or `rand` for models that are not deterministic; of two or three classes what is
            defined of it.
        attacks: only these of the version's attacks, such as ("apgd-ce", "apgd-t"). The others may break more, so the
            caller must not call it AutoAttack's accuracy.
        norm: of the ball.
        settings: JSON-able, whatever else the numbers depend on (checkpoint, data).
        exact: all attacks by the package, on its batches; otherwise the faster ones, equal in law.
        log: told one line an attack.
        tick: told after each batch which part of the work is done, 0 … 1.
        keep: given (images, labels, samples, attack) of what was broken, a batch at a time.
    Returns:
        the finished progress: `broken_by`, `after`, `seconds`, `warnings`.
    Raises:
        ImportError: pyautoattack is not installed.
        ValueError: fewer classes than an attack needs, an attack the version does not have, or `state` belongs to
            another evaluation.
    """
    part = [] if attacks is None else [list(attacks)]
    by = "pyautoattack" if exact else "mimir_fast"
    identity = fingerprint([settings, norm, eps, batch_size, seed, version, len(shard), by, *part])
    progress = Progress.load(state, identity, OTHER)
    # Borrowed, the parameters are frozen: FAB calls backward(), which would fill their `.grad`.
    with borrowed(model, "eval") as module, strict_fp32(device), torch.no_grad():
        warnings: list[str] = []
        attack = package_of(module, eps, device, seed, version, norm, warnings)
        names = list(ATTACKS[version])
        if len(shard):
            x, _, _ = next(shard.batches(1, device))
            names = _fit_classes(attack, module(x).shape[-1], version, attacks)

        def save() -> None:
            progress.warnings = sorted({*progress.warnings, *warnings})
            progress.save(state)

        if len(shard) == 0:
            progress.after, progress.attack = {"clean": 0}, len(names)
        elif not progress.broken_by:
            x, y, _ = next(shard.batches(batch_size, device))
            check_model(attack, x, y)
            for x, y, _ in shard.batches(batch_size, device):
                correct = is_correct(module(x), y).tolist()
                progress.broken_by += [UNBROKEN if right else "clean" for right in correct]
            progress.after["clean"] = len(progress.remaining())
            progress.entered = progress.remaining()
            save()
        while progress.attack < len(names) and progress.remaining():
            name = names[progress.attack]
            started = time.perf_counter() - progress.seconds.get(name, 0.0)
            done, stands = progress.batch, torch.tensor([found == UNBROKEN for found in progress.broken_by])
            if not exact and has_waves(name, norm, version):
                prepared(attack, name)
                waves = Waves(module, attack, name, norm, eps, seed, batch_size, device)
                total = waves.parts * len(progress.entered)
                runs = waves.run(shard, progress.entered, stands, done)
            else:
                total = -(-len(progress.entered) // batch_size)
                runs = batches(prepared(attack, name), shard, progress.entered, batch_size, device, done)
            for progress.batch, rows, adversarial in runs:
                if len(rows):
                    y = shard.labels[rows].to(device)
                    wrong = ~is_correct(module(adversarial), y)
                    for row in rows[wrong.cpu()].tolist():
                        progress.broken_by[row] = name
                        stands[row] = False
                    if keep is not None and bool(wrong.any()):
                        keep(adversarial[wrong], y[wrong], shard.samples[rows][wrong.cpu()], name)
                progress.seconds[name] = time.perf_counter() - started
                save()
                tick(share_done(names, progress, progress.batch / total))
            progress.after[name] = len(progress.remaining())
            log(f"AutoAttack {name}: {len(progress.remaining())} of {len(shard)} left, {progress.seconds[name]:.0f} s")
            progress.attack, progress.batch, progress.entered = progress.attack + 1, 0, progress.remaining()
            save()
        progress.attack = len(names)
        warnings += square_warning(progress.after, len(shard))
        save()
    return progress


def square_warning(after: dict[str, int], total: int) -> list[str]:
    """The package's last check: Square, which sees no gradient, must not find what the gradient attacks missed.

    The package warns beyond 0.2 % of the images, which is one of 48. Here one image proves nothing, and more do where
    they are too many for a share of 0.2 % at 5 %.

    Args:
        after: images not broken after each attack, `clean` first, over all shards.
        total: images evaluated.
    """
    from pyautoattack import checks

    found, counts = list[str](), list(after.values())
    taken = counts[-2] - counts[-1] if len(counts) > 2 and list(after)[-1] == "square" else 0
    if taken > 1 and binomial_tail(taken, total, SQUARE_FINDS) < LEVEL:
        checks.check_square_sr({name: count / total for name, count in after.items()}, logger=listening(found))
    return found


def share_done(names: Sequence[str], progress: Progress, inside: float) -> float:
    """Part of the work that is done, in passes through the model times images.

    Later attacks are taken to face the images that stand now.

    Args:
        inside: the part of the attack in progress that is done.
    """
    faced = list(progress.after.values())[: progress.attack]
    done = sum(PASSES[name] * count for name, count in zip(names, faced, strict=False))
    here = PASSES[names[progress.attack]] * len(progress.entered)
    after = sum(PASSES[name] for name in names[progress.attack + 1 :]) * len(progress.remaining())
    return (done + inside * here) / max(done + here + after, 1)


def _fit_classes(attack: Any, num_classes: int, version: Version, asked: Sequence[str] | None) -> list[str]:
    """The attacks that run; fewer than ten classes have fewer than nine wrong ones: the package would index beyond."""
    known = dict.fromkeys((*ATTACKS[version], *attacks_of(version, num_classes)))
    names = list(attacks_of(version, num_classes) if asked is None else asked)
    if unknown := set(names) - set(known):
        raise ValueError(f"AutoAttack {version} has no {sorted(unknown)}, only {list(known)}")
    require_classes(num_classes, names)
    attack.apgd_targeted.n_target_classes = min(attack.apgd_targeted.n_target_classes, num_classes - 1)
    attack.fab.n_target_classes = min(attack.fab.n_target_classes, num_classes - 1)
    return names


@dataclass(frozen=True)
class AutoAttack(Measurement):
    """The measurement: progress in a file of its own, and one row an image at the end."""

    setup: Setup | None = None

    def run(self, model: nn.Module, shard: EvaluationImages, how: ShardRun) -> Journal:
        """Run, or go on with, AutoAttack on a shard."""
        setup = self.setup
        assert setup is not None
        config, options = setup.config, options_of(setup.config, AutoAttackOptions)

        def keep(x: Tensor, labels: Tensor, samples: Tensor, attack: str) -> None:
            if (folder := setup.keep(f"autoattack-{attack}")) is not None:
                with torch.no_grad():
                    save_images(folder, x, labels, samples, predicted(model(x)))

        progress = run_autoattack(
            model, shard, config.eps, batch_size=how.batch_size, device=how.device,
            state=how.path and how.path.with_suffix(".json"), seed=config.seed, version=options.autoattack_version,
            attacks=options.autoattack_attacks or None, norm=config.norm, settings=how.settings,
            exact=options.autoattack_exact, log=how.log, tick=lambda share: how.tick(share * len(shard)),
            keep=keep if config.save_adversarial else None,
        )  # fmt: skip
        journal = Journal(how.path, how.settings)
        if journal.num_images < len(shard):
            names = progress.broken_by
            row = {"sample": shard.samples, "correct": [int(n == UNBROKEN) for n in names], "broken_by": names}
            journal.append(row, sum(progress.seconds.values()))
        return journal


def check(setup: Setup) -> None:
    """Refuse data of too few classes, and a missing package, before anything is measured."""
    if wanted(setup.config):
        require_package()
        options = options_of(setup.config, AutoAttackOptions)
        require_classes(setup.num_classes, options.chosen_attacks(setup.num_classes))


def measurements(setup: Setup) -> list[Measurement]:
    """AutoAttack, where it is wanted."""
    config, options = setup.config, options_of(setup.config, AutoAttackOptions)
    if not wanted(config):
        return []
    few, names = options.autoattack_images, options.chosen_attacks(setup.num_classes)
    images = setup.subset(few) if few is not None and few < setup.num_images else "all"
    parameters = {
        "norm": config.norm, "eps": config.eps, "version": options.autoattack_version, "attacks": list(names),
        "seed": config.seed, "by": "pyautoattack" if options.autoattack_exact else "mimir_fast",
    }  # fmt: skip
    cost = 0.5 * sum(PASSES[name] for name in names)  # about half of the images are broken on the way
    return [
        AutoAttack(
            NAME, scored(clean), parameters, images, options.title(setup.num_classes), cost, in_ball=True, setup=setup
        )
    ]


def counts_after(item: Measurement, records: Records) -> dict[str, int]:
    """Images not broken after each stage that was reached, `clean` first, over all shards."""
    broken, after = records.rows(item)["broken_by"], dict[str, int]()
    remaining = len(broken)
    for stage in ("clean", *item.parameters["attacks"]):
        if any(stage in state["after"] for state in records.states(item)):
            remaining -= sum(name == stage for name in broken)
            after[stage] = remaining
    return after


def warnings_of(item: Measurement, records: Records) -> list[str]:
    """What the package's own checks found, over all shards."""
    # Each shard has checked its own counts: the share that Square took is one of all images.
    found = {text for state in records.states(item) for text in state["warnings"]}
    total = len(records.rows(item)["broken_by"])
    kept = sorted(
        text for text in found if not text.startswith("Square Attack has decreased") and not _of_few(text, total)
    )
    return kept + square_warning(counts_after(item, records), total)


def _of_few(warning: str, total: int) -> bool:
    """Whether a warning is of so few images with a gradient of zero that it means nothing."""
    points = re.match(r"there are (\d+) points with zero gradient", warning)
    return points is not None and odd_p(int(points.group(1)), total) >= LEVEL


def summarize(setup: Setup, items: Sequence[Measurement], records: Records) -> Numbers | None:
    """Counts after each stage, over all shards."""
    if not items:
        return None
    (item,), options = items, options_of(setup.config, AutoAttackOptions)
    states, after = list(records.states(item)), counts_after(item, records)
    return {
        "title": item.label,
        "whole": options.whole(setup.num_classes),
        "version": options.autoattack_version,
        **records.count(item).as_dict(),
        "after": after,
        "seconds": {s: sum(state["seconds"].get(s, 0.0) for state in states) for s in after if s != "clean"},
        "warnings": warnings_of(item, records),
        "images": setup.num_images,
        "parameters": item.parameters,
    }


def render(numbers: Numbers) -> str:
    """A table of the accuracy after each attack, and the package's warnings."""
    rows = [
        [name, percent(count / numbers["total"]), f"{count}/{numbers['total']}",
         f"{numbers['seconds'].get(name, 0):.0f} s"]
        for name, count in numbers["after"].items()
    ]  # fmt: skip
    words = (
        f"{numbers['title']}, version {numbers['version']}, fp32, {BY[numbers['parameters']['by']]}; each attack runs "
        f"on the images that the ones before did not break. Robust accuracy: {percent(numbers['accuracy'])} "
        f"(95 % interval {span(numbers['interval'])})."
    )
    attacks = tuple(numbers["parameters"]["attacks"])
    if numbers["whole"] and attacks != ATTACKS[numbers["version"]]:
        words += (
            f" It is {', '.join(name.upper() for name in attacks)} here: its other attacks compare more logits than "
            "there are classes."
        )
    if numbers["total"] < numbers["images"]:
        words += f" On {numbers['total']} of the {numbers['images']} images, evenly spaced."
    notes = "".join(paragraph(text, "note") for text in numbers["warnings"])
    return paragraph(words) + table(["after", "accuracy", "still correct", "time"], rows, numbers=range(1, 4)) + notes


def columns(numbers: Numbers) -> list[Column]:
    """Its accuracy; compared with other models' only where all of its attacks ran, with those of the same version."""
    few = numbers["total"] if numbers["total"] < numbers["images"] else None
    version = numbers["version"]
    key = NAME if version == "standard" else f"{NAME} {version}"
    return [Column(key if numbers["whole"] else "", numbers["title"], numbers["accuracy"], few)]


register(Topic(NAME, "AutoAttack", measurements, summarize, render, 20, AutoAttackOptions, check, columns=columns))
