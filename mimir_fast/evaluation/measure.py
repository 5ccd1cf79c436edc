"""Measurements: what is to be known of each image of a set, in true fp32, cut into shards and saved batch by batch.

An attack climbs on tiny differences of the loss; rounding them away (TF32, autocast) looks like robustness.
Shapes: B images a batch, C channels, H × W pixels, K classes.
"""

import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mimir_fast.attacks.losses import margin
from mimir_fast.attacks.pgd import NO_CLASS, cross_entropy, predicted
from mimir_fast.checkpoints.durable import write_whole
from mimir_fast.checkpoints.tensor_files import save_tensors
from mimir_fast.evaluation.finite import finite_mean
from mimir_fast.evaluation.images import EvaluationImages, MakeSet
from mimir_fast.evaluation.journal import Journal, Row, read_journal
from mimir_fast.evaluation.statistics import Count
from mimir_fast.ops._precision import no_autocast

Attack = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
"""(model, images (B, C, H, W) in [0, 1], labels (B,), samples (B,)) → adversarial images."""

Outcome = Callable[[nn.Module, Tensor, Tensor, Tensor], Row]
"""(model, images (B, C, H, W) in [0, 1], labels (B,), samples (B,)) → one row an image."""

UNBROKEN = "none"
"""What stands in place of an attack's name where no attack broke an image."""


@contextmanager
def strict_fp32(device: torch.device) -> Iterator[None]:
    """fp32 matmuls and convolutions without TF32, bf16 or autocast; the settings come back on leaving."""
    cuda, cudnn, onednn = (getattr(torch.backends, name) for name in ("cuda", "cudnn", "mkldnn"))
    products = [cuda.matmul, cudnn.conv, cudnn.rnn, onednn.matmul, onednn.conv, onednn.rnn]
    before = [partial(setattr, each, "fp32_precision", each.fp32_precision) for each in products]
    # PyTorch has older settings beside these, and refuses to read them where the newer ones say something else.
    with suppress(RuntimeError):
        before.insert(0, partial(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision()))
    with suppress(RuntimeError):
        before.insert(0, partial(setattr, cudnn, "allow_tf32", cudnn.allow_tf32))
    try:
        torch.set_float32_matmul_precision("highest")
        cudnn.allow_tf32 = False
        for each in products:
            each.fp32_precision = "ieee"
        with no_autocast(device):
            yield
    finally:
        for restore in before:
            restore()


@dataclass
class ShardRun:
    """How a shard of a measurement is run.

    Attributes:
        path: the journal, which keeps finished batches; None keeps them in memory.
        settings: JSON-able; everything the rows depend on.
        tick: told after each batch how many images are done.
        log: told a line, now and then.
    """

    batch_size: int
    device: torch.device
    path: Path | None = None
    settings: Any = None
    tick: Callable[[float], None] = lambda done: None
    log: Callable[[str], None] = lambda line: None


@dataclass(frozen=True)
class Measurement:
    """What is to be known of each image of a set.

    Attributes:
        name: key in the records and of the file.
        outcome: does the work, a batch at a time.
        parameters: JSON-able; everything the rows depend on beside the model and the images.
        images: name of the set: `all` evaluated images, `few:N` of them at equal distances, or any for `make_set`.
        label: for tables.
        cost: passes through the model an image takes, roughly; for the time left.
        in_ball: the perturbation lies within the ball: an image found wrong here is not robust.
        make_set: makes the images of a shard where `images` is neither `all` nor `few:N`.
    """

    name: str
    outcome: Outcome
    parameters: dict[str, Any] = field(default_factory=dict)
    images: str = "all"
    label: str = ""
    cost: float = 1.0
    in_ball: bool = False
    make_set: MakeSet | None = None

    @property
    def file(self) -> str:
        """Name of its files; sets of different sizes may share a folder."""
        return self.name if self.images == "all" else f"{self.name}@{self.images.replace(':', '-').replace('/', '_')}"

    def run(self, model: nn.Module, shard: EvaluationImages, how: ShardRun) -> Journal:
        """Measure a shard, or what is left of it."""
        return measure(self.outcome, model, shard, how)

    def said(self, record: Journal) -> str:
        """What was found, for the log: the accuracy where there is one."""
        right = record.values.get("correct")
        return f"{100 * sum(right) / len(right):.2f} % ({sum(right)}/{len(right)})" if right else ""


def clean(model: nn.Module, images: Tensor, labels: Tensor, samples: Tensor) -> Tensor:
    """The attack that does nothing."""
    return images


def score(model: nn.Module, x: Tensor, images: Tensor, labels: Tensor) -> Row:
    """Outcome per image, of x, an attacked version of `images`.

    Returns:
        (B,) each: `label`, `correct` (0 or 1), `loss` (cross entropy), `prediction` (class; NO_CLASS where the logits
        are not finite), `margin` (logit of the true class less the largest other), and the size of the perturbation:
        `linf`, `l2`, `l1`.
    Raises:
        ValueError: the model's outputs are not (B, K).
    """
    with torch.no_grad():
        logits = model(x)
    if logits.ndim != 2 or len(logits) != len(images):
        raise ValueError(f"the model returned {tuple(logits.shape)} for {len(images)} images, wanted (B, classes)")
    logits, delta = logits.float(), (x - images).flatten(1)
    prediction = predicted(logits)
    return {
        "label": labels,
        "correct": (prediction == labels).int(),
        "loss": cross_entropy(logits, labels),
        "prediction": prediction,
        "margin": (-margin(logits, labels)).masked_fill(prediction == NO_CLASS, -torch.inf).clamp(-1e30, 1e30),
        "linf": delta.abs().amax(dim=1),
        "l2": delta.norm(dim=1),
        "l1": delta.abs().sum(dim=1),
    }


def scored(attack: Attack, keep: Path | None = None) -> Outcome:
    """Attack the images, then `score` them.

    Args:
        keep: folder for the attacked images, a safetensors file a batch; None keeps none.
    """

    def outcome(model: nn.Module, images: Tensor, labels: Tensor, samples: Tensor) -> Row:
        x = attack(model, images, labels, samples)
        row = score(model, x, images, labels)
        if keep is not None:
            save_images(keep, x, labels, samples, row["prediction"])
        return row

    return outcome


def save_images(folder: Path, x: Tensor, labels: Tensor, samples: Tensor, prediction: Tensor) -> None:
    """Attacked images (B, C, H, W) fp32 with `labels`, `samples` and `predictions`, in one step; named by sample."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"images": x, "labels": labels, "samples": samples, "predictions": prediction}
    on_cpu = {name: t.cpu() for name, t in tensors.items()}
    write_whole(folder / f"{int(samples[0]):08d}.safetensors", partial(save_tensors, on_cpu))


def measure(outcome: Outcome, model: nn.Module, shard: EvaluationImages, how: ShardRun) -> Journal:
    """The rows of a shard, in fp32; goes on where the journal ends."""
    record = Journal(how.path, how.settings)
    with strict_fp32(how.device):
        for images, labels, samples in shard.batches(how.batch_size, how.device, start=record.num_images):
            started = time.perf_counter()
            row = outcome(model, images, labels, samples)
            # Read back before the clock stops: a GPU is done only then.
            row = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in row.items()}
            record.append({"sample": samples, **row}, time.perf_counter() - started)
            how.tick(record.num_images)
    return record


class Records:
    """The measurements of an evaluation, and their rows on disk, in the order of the samples.

    Args:
        folder: of the journals.
        num_shards: how many files a measurement has.
        plan: topic → its measurements, in the order they ran.
    """

    def __init__(self, folder: Path, num_shards: int, plan: Mapping[str, Sequence[Measurement]]) -> None:
        self.folder, self.num_shards, self.plan = folder, num_shards, plan
        self._read: dict[str, tuple[dict[str, list[Any]], float]] = {}

    def items(self, topic: str | None = None) -> list[Measurement]:
        """The measurements of a topic, or of all topics."""
        return [item for name, items in self.plan.items() if topic in (None, name) for item in items]

    def without(self, topics: Collection[str]) -> "Records":
        """The same without the measurements of some topics."""
        plan = {name: () if name in topics else items for name, items in self.plan.items()}
        return Records(self.folder, self.num_shards, plan)

    def path(self, item: Measurement, shard: int) -> Path:
        """The journal of a measurement's shard."""
        return self.folder / f"{item.file}.{shard}of{self.num_shards}.jsonl"

    def rows(self, item: Measurement) -> dict[str, list[Any]]:
        """Name → one value an image."""
        return self._load(item)[0]

    def tensor(self, item: Measurement, name: str) -> Tensor:
        """(N, …) fp64 of one value."""
        return torch.tensor(self.rows(item)[name], dtype=torch.float64)

    def mean(self, item: Measurement, name: str) -> float:
        """Of one value; see `finite_mean`."""
        return finite_mean(self.tensor(item, name))

    def count(self, item: Measurement) -> Count:
        """Images that are classified correctly."""
        correct = self.rows(item)["correct"]
        return Count(int(sum(correct)), len(correct))

    def seconds(self, item: Measurement) -> float:
        """Time spent, summed over the shards."""
        return self._load(item)[1]

    def states(self, item: Measurement) -> Iterator[dict[str, Any]]:
        """What a measurement keeps beside its rows, one a shard."""
        for number in range(self.num_shards):
            if (path := self.path(item, number).with_suffix(".json")).exists():
                yield json.loads(path.read_text())

    def _load(self, item: Measurement) -> tuple[dict[str, list[Any]], float]:
        if item.file not in self._read:
            journals = [read_journal(self.path(item, number)) for number in range(self.num_shards)]
            samples = [s for journal in journals for s in journal.values.get("sample", [])]
            order = sorted(range(len(samples)), key=samples.__getitem__)
            names = next((journal.values for journal in journals if journal.values), {})
            columns = {name: [v for journal in journals for v in journal.values.get(name, [])] for name in names}
            rows = {name: [column[i] for i in order] for name, column in columns.items()}
            self._read[item.file] = rows, sum(journal.seconds for journal in journals)
        return self._read[item.file]
