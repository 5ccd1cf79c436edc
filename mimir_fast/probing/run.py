"""From a frozen encoder and a data set to numbers: features once, then each probe on each share of the labels.

Features are computed on all ranks; probes are trained and attacked on the main one.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from mimir_fast.attacks.pgd import is_correct, pgd
from mimir_fast.attacks.threat_model import LinfThreat
from mimir_fast.data.sources import build_source
from mimir_fast.data.sources.base import ImageSource, evenly
from mimir_fast.evaluation.images import EvaluationImages, load_from
from mimir_fast.evaluation.measure import strict_fp32
from mimir_fast.evaluation.options import radius_text
from mimir_fast.evaluation.statistics import Count
from mimir_fast.probing.attentive import ENOUGH, Probed, train_attentive
from mimir_fast.probing.config import ProbeName, ProbingConfig
from mimir_fast.probing.encoder import FrozenEncoder
from mimir_fast.probing.features import Features, decoded, extract
from mimir_fast.probing.heads import Heads, logistic_regression, train_heads
from mimir_fast.probing.neighbours import NeighbourHead
from mimir_fast.probing.picture import View
from mimir_fast.world import World

HELD_OUT = 0.1
"""Share of the training images on which the learning rate of the linear probe is chosen."""
PICTURED, COMPARED = 256, 2048
"""Test images at most that pictures look at under attack, and that the layers of two models are compared on."""
WORDS: dict[str, str] = {"knn": "nearest neighbours", "linear": "linear probe", "logistic": "logistic regression",
         "attentive": "attentive probe"}  # fmt: skip


@dataclass
class Outcome:
    """What one probe found with one share of the labels.

    Attributes:
        probe, fraction: which.
        train_images: whose labels it saw.
        right: (N,) bool, of each test image in their order.
        right_attacked: the same of those that PGD attacked through encoder and probe; None without attack.
        seconds: to train it.
        sweep: (learning rate, accuracy on held-out training images), of the linear probe.
    """

    probe: ProbeName
    fraction: float
    train_images: int
    right: Tensor
    right_attacked: Tensor | None
    seconds: float
    sweep: list[tuple[float, float]]

    @property
    def clean(self) -> Count:
        """Test images that are right."""
        return Count(int(self.right.sum()), len(self.right))

    @property
    def attacked(self) -> Count | None:
        """Of the attacked ones."""
        right = self.right_attacked
        return None if right is None else Count(int(right.sum()), len(right))

    def as_dict(self) -> dict[str, object]:
        """For results.json; `right` has one 0 or 1 an image."""
        counts = {
            name: None if right is None or count is None else {**count.as_dict(), "right": bits(right)}
            for name, count, right in (
                ("clean", self.clean, self.right), ("attacked", self.attacked, self.right_attacked)
            )
        }  # fmt: skip
        return {
            "probe": self.probe, "fraction": self.fraction, "train_images": self.train_images, **counts,
            "seconds": self.seconds, "sweep": self.sweep,
        }  # fmt: skip


class Probing:
    """The features of a data set and the probes on them.

    Args:
        log: called with a line for each probe.
    Attributes:
        notes: what a reader of the numbers must know.
    """

    def __init__(
        self, config: ProbingConfig, encoder: FrozenEncoder, world: World,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:  # fmt: skip
        self.config, self.encoder, self.world, self.log = config, encoder.to(world.device), world, log
        self.train_source, self.test_source = (build_source(config.data, split) for split in ("train", "test"))
        for source in (self.train_source, self.test_source):
            if source.num_classes < 2 or (np.asarray(source.labels) < 0).any():
                raise ValueError(f"{source.name} has images without labels: a probe needs the labels of all")
        self.num_classes = self.train_source.num_classes
        self.pictured: list[Tensor] = []
        self.notes: list[str] = []
        self.train, self.test = self._features(self.train_source, "train"), self._features(self.test_source, "test")

    def _features(self, source: ImageSource, split: str) -> Features:
        limit = len(source) if self.config.limit is None or split == "train" else self.config.limit
        indices = evenly(np.asarray(source.labels), limit)
        path = self.config.folder / f"{split}.npy"
        started = time.perf_counter()
        with strict_fp32(self.world.device):
            found = extract(
                self.encoder, source, self.config.data, indices, path, self.world, batch_size=self.config.batch_size
            )
        seconds = time.perf_counter() - started
        if broken := sum(int((~block.isfinite().all(dim=1)).sum()) for block in found.values.split(4096)):
            raise ValueError(
                f"{self.config.checkpoint} gives NaN or infinity for {broken:,} of {len(found):,} {split} images: its "
                "training diverged, or these are not its weights"
            )
        self.log(f"features of {len(found):,} {split} images: {seconds:.1f} s ({len(found) / seconds:,.0f} images/s)")
        return found

    def run(self) -> list[Outcome]:
        """Every probe on every share of the labels. On the main rank only."""
        attacked = self._attacked_images()
        outcomes = []
        with strict_fp32(self.world.device):
            for fraction in self.config.label_fractions:
                train = self.train.take(share(self.train.labels, fraction, self.config.seed))
                for name in self.config.probes:
                    outcome = self._probe(name, fraction, train, attacked)
                    line = f"{name:>10} on {outcome.train_images:,} labels: {outcome.clean}"
                    line += f", under attack {outcome.attacked}" if outcome.attacked else ""
                    self.log(f"{line}, {outcome.seconds:.1f} s")
                    outcomes.append(outcome)
        return outcomes

    def _probe(self, name: ProbeName, fraction: float, train: Features, attacked: EvaluationImages | None) -> Outcome:
        started = time.perf_counter()
        head, sweep = self._head(name, train)
        seconds = time.perf_counter() - started
        probed = Probed(self.encoder, head.to(self.world.device)).eval().requires_grad_(False)
        if name == "attentive":
            right = torch.cat([self._right(probed, x, y) for x, y in self._tests()])
        else:
            right = _right(head.cpu(), self.test)
        under_attack = None
        if attacked is not None:
            keeps = (name, fraction) == self._pictured
            under_attack = self._attack(probed.to(self.world.device), attacked, self.pictured if keeps else None)
        return Outcome(name, fraction, len(train), right, under_attack, seconds, sweep)

    def _head(self, name: ProbeName, train: Features) -> tuple[nn.Module, list[tuple[float, float]]]:
        config = self.config
        if name == "knn":
            k = min(config.neighbours, len(train))
            if k < config.neighbours:
                self._note(f"knn on {k} labels: fewer than the {config.neighbours} --neighbours asked for; all vote.")
            return NeighbourHead(train.values, train.labels, self.num_classes, k), []
        if name == "logistic":
            return logistic_regression(train, self.num_classes).linear(0), []
        if name == "linear":
            heads, sweep = self._best_linear(train)
            return heads, sweep
        batch = min(self._at_once, len(train))
        epochs, per_epoch = config.attentive_epochs, len(train) // batch
        steps = f"{epochs} epochs are {epochs * per_epoch:,} steps of {batch} images"
        if epochs * per_epoch < ENOUGH:
            self._note(
                f"attentive on {len(train):,} labels: {steps}, too few for a query and a head that start at random: "
                f"--attentive_epochs {-(-ENOUGH // per_epoch)} gives {ENOUGH}."
            )
        else:
            self.log(f"attentive on {len(train):,} labels: {steps}")
        images = load_from(self.train_source, config.data, train.samples.numpy())
        return train_attentive(
            self.encoder, images, self.num_classes, epochs=epochs, seed=config.seed, batch_size=batch,
            device=self.world.device,
        ), []  # fmt: skip

    def _note(self, words: str) -> None:
        self.notes.append(words)
        self.log(words)

    def _best_linear(self, train: Features) -> tuple[nn.Linear, list[tuple[float, float]]]:
        """The head of the rate that is best on held-out training images; all rates are trained together."""
        config = self.config
        held = share(train.labels, HELD_OUT, config.seed + 1)
        held = held[train.labels.bincount()[train.labels[held]] > 1]  # the only image of a class is trained on
        rest = torch.ones(len(train), dtype=torch.bool)
        rest[held] = False
        if not len(held):
            self._note(f"linear on {len(train)} labels: one image a class, so the learning rate is chosen on these.")
            held = rest.nonzero()[:, 0]
        heads: Heads = train_heads(
            train.take(rest.nonzero()[:, 0]), self.num_classes, epochs=config.epochs, batch_size=config.batch_size,
            seed=config.seed, device=self.world.device,
        )  # fmt: skip
        accuracies = heads.accuracies(train.take(held))
        best = max(range(len(accuracies)), key=accuracies.__getitem__)
        return heads.linear(best), list(zip(heads.rates, accuracies, strict=True))

    def _attacked_images(self) -> EvaluationImages | None:
        count = min(self.config.attack_images, len(self.test))
        if not count or not self.config.eps:
            return None
        return self._load(count)

    def _load(self, count: int) -> EvaluationImages:
        """Test images at equal distances."""
        count = min(count, len(self.test))
        chosen = self.test.samples[torch.arange(count) * len(self.test) // count]
        return load_from(self.test_source, self.config.data, chosen.numpy())

    def _attack(self, probed: nn.Module, images: EvaluationImages, kept: list[Tensor] | None) -> Tensor:
        """(N,) bool: right under attack. The attacked images that pictures need are added to `kept`."""
        eps = self.config.eps
        threat = LinfThreat(eps=eps, alpha=eps / 4, num_steps=self.config.attack_steps)
        wanted = set(images.evenly(PICTURED).samples.tolist())
        right = []
        for x, labels, samples in images.batches(self._at_once, self.world.device):
            adversarial = pgd(probed, x, labels, threat, samples=samples, seed=self.config.seed, mode="eval")
            right.append(self._right(probed, adversarial, labels))
            if kept is not None:
                kept.append(adversarial[[s in wanted for s in samples.tolist()]].cpu())
        return torch.cat(right)

    @property
    def _at_once(self) -> int:
        return min(128, self.config.batch_size)

    @property
    def _pictured(self) -> tuple[ProbeName, float]:
        """The probe through which the attack of the pictures goes: on the most labels, the linear one if there is."""
        order = {"linear": 0, "logistic": 1, "attentive": 2, "knn": 3}
        return min(self.config.probes, key=order.__getitem__), max(self.config.label_fractions)

    def _tests(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixels and labels of the test images, some at a time."""
        for images in decoded(self.test_source, self.config.data, self.test.samples.numpy()):
            for x, labels, _ in images.batches(self._at_once, self.world.device):
                yield x, labels

    @torch.no_grad()
    def _right(self, probed: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return is_correct(probed(images), labels).cpu()

    def view(self, against: FrozenEncoder | None = None) -> View:
        """What pictures look at; after `run`, with the attacked images of one probe. On the main rank only."""
        config, images = self.config, self._attacked_images()
        attacked = torch.cat(self.pictured) if self.pictured else None
        few = self._load(PICTURED) if images is None or attacked is None else images.evenly(PICTURED)
        steps = f"PGD-{config.attack_steps} through {WORDS[self._pictured[0]]}, ε = {radius_text(config.eps, 'linf')}"
        return View(
            self.encoder, config.checkpoint, few, attacked, steps, self._load(COMPARED if against else 1),
            self.world.device, against, config.against or "",
        )  # fmt: skip


@torch.no_grad()
def _right(head: nn.Module, features: Features) -> Tensor:
    blocks = zip(features.values.split(4096), features.labels.split(4096), strict=True)
    return torch.cat([is_correct(head(values), labels) for values, labels in blocks])


def share(labels_N: Tensor, fraction: float, seed: int) -> Tensor:
    """Ascending positions of a share of the images, of every class as many in a hundred, and at least one."""
    if fraction == 1:
        return torch.arange(len(labels_N))
    order = torch.randperm(len(labels_N), generator=torch.Generator().manual_seed(seed))
    chosen = []
    for label in labels_N.unique():
        own = order[labels_N[order] == label]
        chosen.append(own[: max(1, round(fraction * len(own)))])
    return torch.cat(chosen).sort().values


def bits(right_N: Tensor) -> str:
    """One character an image, 0 or 1."""
    return "".join("1" if right else "0" for right in right_N.tolist())
