"""Several attacks one after the other, each on the images that the ones before did not break, the fastest first.

    pilot    a short form of every attack, on the same few images: which of them does it break, in how much time
    order    the attack that breaks most of them a second; then the one that breaks most a second of those it left; …
    then     attack after attack, on the images that none has broken, batch by batch, to the end or until time is up

The pilot decides the order and nothing else. A clock is in it, so the order is kept on disk at the first start, for all
shards: that of the shard which has measured it first. Images are taken in random order, so that those of the pilot, and
those that an attack has reached when time is up, are a fair sample. Everything is saved after each batch.

Shapes: N images of a shard, B of a batch, C channels, H × W pixels.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from mimir_fast.attacks.pgd import is_correct
from mimir_fast.checkpoints.durable import write_text
from mimir_fast.evaluation.attack_progress import AttackProgress
from mimir_fast.evaluation.images import EvaluationImages
from mimir_fast.evaluation.measure import UNBROKEN, Attack, ShardRun, strict_fp32
from mimir_fast.layers.borrowing import borrowed

PILOT, PART = 32, 8
"""The pilot has so many images, but no more than one in PART."""
CLEAN = "clean"
"""Stands in place of an attack's name where the model is wrong without one."""

OTHER = "other attacks, or of the same ones with other settings"

Inside = Callable[[Tensor, Tensor], Tensor]
"""(attacked (B, C, H, W), clean) → (B,) bool: whether each is an image that the adversary may make."""
Found = Callable[[Tensor, Tensor, Tensor, str], None]
"""Told (attacked images, labels, samples, attack) of what was broken, a batch at a time."""


@dataclass
class Progress(AttackProgress):
    """Images are numbered in the order they are taken.

    Attributes:
        pilot: an attack → the images that its short form breaks.
        pilot_seconds: an attack → time spent on that.
        order: of the attacks; [] until the pilot is done.
        reached: an attack → how many images it has passed: it has attacked those of them that stood.
        faced: an attack → how many it has attacked.
    """

    pilot: dict[str, list[int]] = field(default_factory=dict)
    pilot_seconds: dict[str, float] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    reached: dict[str, int] = field(default_factory=dict)
    faced: dict[str, int] = field(default_factory=dict)

    @property
    def spent(self) -> float:
        """Seconds, with the pilot."""
        return sum(self.seconds.values()) + sum(self.pilot_seconds.values())


def taken(count: int, seed: int) -> Tensor:
    """(N,) int64 positions of the images in the order they are taken."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def fastest_first(pilot: Mapping[str, Sequence[int]], seconds: Mapping[str, float]) -> list[str]:
    """The order: by breaks a second among the images that the attacks before leave; where none breaks any, among all.

    Args:
        pilot: an attack → the images it breaks.
        seconds: an attack → time spent on the pilot's images.
    """
    left, order, broken = list(pilot), list[str](), set[int]()

    def rate(name: str) -> tuple[float, float, float]:
        spent = max(seconds[name], 1e-9)
        return len(set(pilot[name]) - broken) / spent, len(pilot[name]) / spent, -spent

    while left:
        order.append(max(left, key=rate))
        left.remove(order[-1])
        broken |= set(pilot[order[-1]])
    return order


def run_in_sequence(
    model: nn.Module, shard: EvaluationImages, attacks: Mapping[str, Attack], how: ShardRun, *,
    short: Mapping[str, Attack], inside: Inside, identity: str, seed: int = 0, budget: float | None = None,
    order_file: Path | None = None, found: Found | None = None,
) -> Progress:  # fmt: skip
    """Attack a shard, or what is left of it, in fp32; the model is left untouched.

    Args:
        attacks: by name. Those that draw random numbers by themselves must be seeded.
        how: its `path` is the file of the progress, None for none.
        short: their short forms.
        inside: an attacked image counts as broken only where this holds.
        identity: fingerprint of what the numbers depend on.
        seed: of the order of the images.
        budget: seconds of attacks on this shard, all starts together; the batch that is under way is finished.
        order_file: the order, for all shards.
        found: told what was broken.
    Raises:
        OtherMeasurementError: the file is the progress of another evaluation.
    """
    progress = Progress.load(how.path, identity, OTHER)
    with borrowed(model, "eval") as module, strict_fp32(how.device), torch.no_grad():
        run = _Run(module, shard, attacks, short, how, inside, budget, found, progress, taken(len(shard), seed))
        if len(progress.broken_by) < len(shard):
            run.look()
        if not progress.order and not run.adopt(order_file) and run.pilot():
            progress.order = fastest_first(progress.pilot, progress.pilot_seconds)
            if order_file is not None and len(shard) and not order_file.exists():
                write_text(order_file, json.dumps(progress.order) + "\n")
            run.adopt(order_file)
            run.save()
        if progress.order:
            run.rest()
    return progress


@dataclass
class _Run:
    """Attacks on a shard; `places`: (N,) positions of the images in the order they are taken."""

    module: nn.Module
    shard: EvaluationImages
    attacks: Mapping[str, Attack]
    short: Mapping[str, Attack]
    how: ShardRun
    inside: Inside
    budget: float | None
    found: Found | None
    progress: Progress
    places: Tensor

    def save(self) -> None:
        self.progress.save(self.how.path)

    def over(self) -> bool:
        """Whether time is up."""
        return self.budget is not None and self.progress.spent >= self.budget

    def load(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, C, H, W) float in [0, 1], labels and samples (B,)."""
        rows, device = self.places[torch.tensor(numbers)], self.how.device
        images = self.shard.images[rows].to(device).float() / 255
        return images, self.shard.labels[rows].to(device), self.shard.samples[rows].to(device)

    def look(self) -> None:
        """Which images are right without attack."""
        outcome, size = list[str](), self.how.batch_size
        for first in range(0, len(self.shard), size):
            images, labels, _ = self.load(range(first, min(first + size, len(self.shard))))
            outcome += [UNBROKEN if right else CLEAN for right in is_correct(self.module(images), labels).tolist()]
        self.progress.broken_by = outcome
        self.save()

    def adopt(self, order_file: Path | None) -> bool:
        """Take the order that is on disk, if it is one of these attacks."""
        if order_file is None or not order_file.exists():
            return False
        order = json.loads(order_file.read_text())
        if sorted(order) != sorted(self.attacks):
            return False
        self.progress.order = order
        return True

    def broken(self, attack: Attack, numbers: Sequence[int]) -> tuple[list[int], Tensor, Tensor, Tensor]:
        """Those of the images that an attack breaks: their numbers, as it left them, labels, samples."""
        images, labels, samples = self.load(numbers)
        # A copy goes in: packages reshape a lone label in place.
        x = attack(self.module, images.clone(), labels.clone(), samples)
        wrong = ~is_correct(self.module(x), labels) & self.inside(x, images)
        found = [number for number, done in zip(numbers, wrong.tolist(), strict=True) if done]
        return found, x[wrong], labels[wrong], samples[wrong]

    def pilot(self) -> bool:
        """The short form of every attack on the same images; False where time is up before."""
        progress, size = self.progress, self.how.batch_size
        count = min(PILOT, -(-len(self.shard) // PART))
        right = [number for number in range(count) if progress.broken_by[number] != CLEAN]
        for name, attack in self.short.items():
            if name in progress.pilot:
                continue
            if self.over():
                return False
            started = time.perf_counter()
            batches = [right[first : first + size] for first in range(0, len(right), size)]
            progress.pilot[name] = [number for batch in batches for number in self.broken(attack, batch)[0]]
            progress.pilot_seconds[name] = time.perf_counter() - started
            self.save()
        return True

    def attack(self, name: str, numbers: Sequence[int]) -> None:
        """One batch."""
        progress, started = self.progress, time.perf_counter()
        broken, x, labels, samples = self.broken(self.attacks[name], numbers)
        for number in broken:
            progress.broken_by[number] = name
        if self.found is not None and broken:
            self.found(x, labels, samples, name)
        progress.seconds[name] = progress.seconds.get(name, 0.0) + time.perf_counter() - started
        progress.faced[name] = progress.faced.get(name, 0) + len(numbers)

    def rest(self) -> None:
        """Attack after attack on the images that stand."""
        progress, size, total = self.progress, self.how.batch_size, len(self.shard)
        while progress.attack < len(progress.order):
            name = progress.order[progress.attack]
            if progress.batch == 0:
                progress.entered = progress.remaining()
            entered = progress.entered
            for first in range(progress.batch * size, len(entered), size):
                if self.over():
                    return
                self.attack(name, entered[first : first + size])
                progress.batch += 1
                progress.reached[name] = entered[first + size] if first + size < len(entered) else total
                self.save()
                self.how.tick(self._share_done() * total)
            progress.reached[name] = total
            self.how.log(
                f"{name}: {progress.broken_by.count(name)} broken, {len(progress.remaining())} of {total} left, "
                f"{progress.seconds.get(name, 0.0):.0f} s"
            )
            progress.attack, progress.batch, progress.entered = progress.attack + 1, 0, []
            self.save()

    def _share_done(self) -> float:
        """Part of the attacks that is done, 0 … 1, by the time that each took of an image."""
        progress = self.progress
        known = {n: progress.seconds.get(n, 0.0) / max(1, progress.faced.get(n, 0)) for n in progress.order}
        usual = sum(known.values()) / max(1, sum(value > 0 for value in known.values())) or 1.0
        weights = [known[name] or usual for name in progress.order]
        inside = progress.batch * self.how.batch_size / max(1, len(progress.entered))
        done = sum(weights[: progress.attack]) + weights[progress.attack] * min(1.0, inside)
        return done / sum(weights)
