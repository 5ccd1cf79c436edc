"""Measurements: one attack on one set of images, a row an image, cut into shards and saved batch by batch.

Every pass through a model is one of these, so whatever is killed goes on, on any number of processes. A shard's rows
are lines of a file:

    {"fingerprint": …, "settings": {…}}                                                  first: what they depend on
    {"start": 0, "stop": 128, "seconds": 1.5, "values": {"sample": […], "correct": […], "loss": […]}}

Another fingerprint is another measurement: refused, not mixed in.
Shapes: B images a batch, C channels, H × W pixels, K classes.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mimir_fast.attacks.pgd import cross_entropy
from mimir_fast.data.batch import Batch
from mimir_fast.evaluation.images import EvaluationImages
from mimir_fast.evaluation.precision import strict_fp32

Attack = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
"""(model, images (B, C, H, W), labels (B,), samples (B,)) → adversarial images."""

Row = dict[str, Any]
"""Name → (B, …) tensor, or a list of B things JSON can hold."""


class Helpers:
    """Models a measurement needs beside the judged one, loaded when they are first asked for."""

    def __init__(self, loaders: dict[str, Callable[[], Any]] | None = None) -> None:
        self._loaders, self._loaded = dict(loaders or {}), dict[str, Any]()

    def __getitem__(self, name: str) -> Any:
        if name not in self._loaded:
            self._loaded[name] = self._loaders[name]()
        return self._loaded[name]


Outcome = Callable[[nn.Module, Tensor, Tensor, Tensor, Helpers], Row]
"""(model, images (B, C, H, W), labels (B,), samples (B,), helpers) → one row an image."""


@dataclass
class Place:
    """Where and how a shard of a measurement is worked on.

    Attributes:
        path: the journal.
        settings: JSON-able; everything the rows depend on.
        tick: told how many images are done.
        say: told a line, now and then.
    """

    path: Path
    settings: Any
    batch_size: int
    device: torch.device
    helpers: Helpers
    tick: Callable[[float], None] = lambda done: None
    say: Callable[[str], None] = lambda line: None


@dataclass(frozen=True)
class Measurement:
    """What is to be known of each image of a set.

    Attributes:
        name: key in the records and of the file.
        outcome: does the work, a batch at a time.
        parameters: JSON-able; everything the rows depend on beside the model and the images.
        images: the set: `all` of the judged images, `few:N` of them at equal distances, or a set that a section names.
        label: for tables.
        cost: passes through the model an image takes, roughly; for the time left.
        breaks: an image found wrong here is not robust: the perturbation lies within the judged ball.
    """

    name: str
    outcome: Outcome
    parameters: dict[str, Any] = field(default_factory=dict)
    images: str = "all"
    label: str = ""
    cost: float = 1.0
    breaks: bool = False

    @property
    def file(self) -> str:
        """Name of its files; sets of different sizes may share a folder."""
        return self.name if self.images == "all" else f"{self.name}@{self.images.replace(':', '-').replace('/', '_')}"

    def run(self, model: nn.Module, shard: EvaluationImages, place: Place) -> "Journal":
        """Measure a shard, or what is left of it."""
        return take(
            self.outcome, model, shard, batch_size=place.batch_size, device=place.device, helpers=place.helpers,
            journal=place.path, settings=place.settings, tick=place.tick,
        )  # fmt: skip


@dataclass(frozen=True)
class Count:
    """Correct among all; prints as a percentage."""

    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """Part of the images that are classified correctly, 0 … 1."""
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy on the whole distribution; also sound at 0 and at 1.

        Wilson 1927, doi:10.1080/01621459.1927.10502953.
        """
        n, p, z = self.total, self.accuracy, 1.959964
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5 / (1 + z * z / n)
        return max(0.0, middle - half), min(1.0, middle + half)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "correct": self.correct, "total": self.total, "accuracy": self.accuracy, "interval": list(self.interval),
        }  # fmt: skip

    def __str__(self) -> str:
        return f"{100 * self.accuracy:.2f} % ({self.correct}/{self.total})"


def fingerprint(settings: Any) -> str:
    """A short hash of JSON-able settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def write_atomically(path: Path, text: str) -> None:
    """Replace the file in one step: after a kill there is the old content or the new one, never half."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with aside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


class Journal:
    """Rows of images 0 … N−1 of a shard, appended batch by batch.

    Args:
        path: the file; its folder must exist. None keeps everything in memory.
        settings: JSON-able; whatever changes the rows.
    Attributes:
        values: name → one value an image, so far.
        num_images: how many.
        seconds: spent on them.
    Raises:
        ValueError: the file holds another measurement.
    """

    def __init__(self, path: Path | None, settings: Any = None) -> None:
        self.path, self.num_images, self.seconds = path, 0, 0.0
        self.values: dict[str, list[Any]] = {}
        if path is None:
            return
        head = {"fingerprint": fingerprint(settings), "settings": settings}
        if path.exists() and (lines := path.read_text().splitlines(keepends=True)) and lines[0].endswith("\n"):
            self._restore(path, lines, head)
        else:
            write_atomically(path, json.dumps(head) + "\n")

    def _restore(self, path: Path, lines: list[str], head: dict[str, Any]) -> None:
        saved = json.loads(lines[0])
        if saved["fingerprint"] != head["fingerprint"]:
            raise ValueError(
                f"{path} holds a measurement with other settings: {saved['settings']}, now {head['settings']}; "
                "give another --output_dir, or --overwrite to start anew"
            )
        whole = [line for line in lines[1:] if line.endswith("\n")]
        for line in whole:
            entry = json.loads(line)
            self._extend(entry["values"], entry["stop"], entry["seconds"])
        if len(whole) < len(lines) - 1:  # a line cut short by a kill
            write_atomically(path, lines[0] + "".join(whole))

    def _extend(self, values: dict[str, list[Any]], stop: int, seconds: float) -> None:
        for name, numbers in values.items():
            self.values.setdefault(name, []).extend(numbers)
        self.num_images = stop
        self.seconds += seconds

    def append(self, row: Row, seconds: float = 0.0) -> None:
        """Record one batch: name → (B, …) tensor or list of B."""
        values = {
            name: value.detach().cpu().tolist() if isinstance(value, Tensor) else list(value)
            for name, value in row.items()
        }
        start, size = self.num_images, len(next(iter(values.values())))
        self._extend(values, start + size, seconds)
        if self.path is not None:
            line = {"start": start, "stop": start + size, "seconds": round(seconds, 4), "values": values}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def tensor(self, name: str) -> Tensor:
        """(N, …) fp64 of one value."""
        return torch.tensor(self.values.get(name, []), dtype=torch.float64)


def read_journal(path: Path) -> Journal:
    """A journal as it is on disk, whatever it was made with; half a line at the end is left out."""
    journal = Journal(None)
    with path.open() as file:
        next(file, None)
        for line in file:
            if line.endswith("\n"):
                entry = json.loads(line)
                journal._extend(entry["values"], entry["stop"], entry["seconds"])
    return journal


def clean(model: nn.Module, images: Tensor, labels: Tensor, samples: Tensor) -> Tensor:
    """The attack that does nothing."""
    return images


def look(model: nn.Module, x: Tensor, images: Tensor, labels: Tensor) -> Row:
    """What the model makes of x, an attacked version of `images`.

    Returns:
        (B,) each: `label`, `correct` (0 or 1), `loss` (cross entropy), `prediction` (class), `margin` (logit of the
        true class less the largest other), and the size of the perturbation: `linf`, `l2`, `l1`.
    Raises:
        ValueError: the model's outputs are not (B, K).
    """
    with torch.no_grad():
        logits = model(x)
    if logits.ndim != 2 or len(logits) != len(images):
        raise ValueError(f"the model returned {tuple(logits.shape)} for {len(images)} images, wanted (B, classes)")
    logits, delta = logits.float(), (x - images).flatten(1)
    true = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1)
    prediction = logits.argmax(dim=1)
    return {
        "label": labels,
        "correct": (prediction == labels).int(),
        "loss": cross_entropy(logits, labels),
        "prediction": prediction,
        "margin": (true[:, 0] - others).nan_to_num(nan=0.0, posinf=1e30, neginf=-1e30),
        "linf": delta.abs().amax(dim=1),
        "l2": delta.norm(dim=1),
        "l1": delta.abs().sum(dim=1),
    }


def under(attack: Attack, keep: Path | None = None) -> Outcome:
    """What the model makes of images under an attack.

    Args:
        keep: folder for the attacked images, a safetensors file a batch; None keeps none.
    """

    def outcome(model: nn.Module, images: Tensor, labels: Tensor, samples: Tensor, helpers: Helpers) -> Row:
        x = attack(model, images, labels, samples)
        row = look(model, x, images, labels)
        if keep is not None:
            save_images(keep, x, labels, samples, row["prediction"])
        return row

    return outcome


def save_images(folder: Path, x: Tensor, labels: Tensor, samples: Tensor, prediction: Tensor) -> None:
    """Attacked images (B, C, H, W) fp32 with `labels`, `samples` and `predictions`, in one step; named by sample."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{int(samples[0]):08d}.safetensors"
    aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    tensors = {"images": x, "labels": labels, "samples": samples, "predictions": prediction}
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, aside)
    aside.replace(path)


def take(
    outcome: Outcome, model: nn.Module, shard: EvaluationImages, *, batch_size: int, device: torch.device,
    helpers: Helpers | None = None, journal: Path | None = None, settings: Any = None,
    tick: Callable[[float], None] = lambda done: None,
) -> Journal:  # fmt: skip
    """The rows of a shard, in fp32; goes on where the journal ends.

    Args:
        journal: the file that keeps finished batches.
        settings: JSON-able description of everything the rows depend on.
        tick: told after each batch how many images are done.
    """
    record = Journal(journal, settings)
    with strict_fp32(device):
        for images, labels, samples in shard.batches(batch_size, device, start=record.num_images):
            started = time.perf_counter()
            row = outcome(model, images, labels, samples, helpers or Helpers())
            # Read back before the clock stops: a GPU is done only then.
            row = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in row.items()}
            record.append({"sample": samples, **row}, time.perf_counter() - started)
            tick(record.num_images)
    return record


def measure(
    model: nn.Module, shard: EvaluationImages, attack: Attack = clean, *, batch_size: int, device: torch.device,
    journal: Path | None = None, settings: Any = None,
) -> Journal:  # fmt: skip
    """`look` at every image of a shard under an attack; see `take`."""
    return take(under(attack), model, shard, batch_size=batch_size, device=device, journal=journal, settings=settings)


def accuracy(model: nn.Module, batches: Iterable[Batch], attack: Attack = clean) -> Count:
    """Accuracy over a loader's evaluation pass; counts of all processes are added when there are several.

    Args:
        model: takes float images in [0, 1] on the batches' device.
        batches: `build_loader(…, split="test")`, uint8 or float images.
        attack: such as `lambda model, x, y, samples: pgd(model, x, y, threat, samples=samples, mode="eval")`.
    Raises:
        ValueError: there was no image.
    """
    from torch import distributed as dist

    totals = torch.zeros(2, dtype=torch.int64)
    for batch in batches:
        images = batch.images.float() / 255 if batch.images.dtype == torch.uint8 else batch.images
        with strict_fp32(images.device):
            x = attack(model, images, batch.labels, batch.samples)
            correct = look(model, x, images, batch.labels)["correct"]
        totals += torch.tensor([int(correct.sum()), len(images)])
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(totals)
    if totals[1] == 0:
        raise ValueError("accuracy of no images: the loader is empty, or the limit is 0")
    return Count(int(totals[0]), int(totals[1]))


class Records:
    """Finished measurements, read from disk, rows in the order of the samples.

    Args:
        folder: of the journals.
        num_shards: how many files a measurement has.
        plan: all measurements of the evaluation.
    """

    def __init__(self, folder: Path, num_shards: int, plan: Sequence[Measurement]) -> None:
        self.folder, self.num_shards, self.plan = folder, num_shards, tuple(plan)
        self._read: dict[str, tuple[dict[str, list[Any]], float]] = {}

    def rows(self, item: Measurement) -> dict[str, list[Any]]:
        """Name → one value an image."""
        return self._load(item)[0]

    def tensor(self, item: Measurement, name: str) -> Tensor:
        """(N, …) fp64 of one value."""
        return torch.tensor(self.rows(item)[name], dtype=torch.float64)

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
            path = self.folder / f"{item.file}.{number}of{self.num_shards}.json"
            if path.exists():
                yield json.loads(path.read_text())

    def _load(self, item: Measurement) -> tuple[dict[str, list[Any]], float]:
        if item.file not in self._read:
            journals = [
                read_journal(self.folder / f"{item.file}.{k}of{self.num_shards}.jsonl") for k in range(self.num_shards)
            ]
            samples = [s for journal in journals for s in journal.values.get("sample", [])]
            order = sorted(range(len(samples)), key=samples.__getitem__)
            names = next((journal.values for journal in journals if journal.values), {})
            columns = {name: [v for journal in journals for v in journal.values.get(name, [])] for name in names}
            rows = {name: [column[i] for i in order] for name, column in columns.items()}
            self._read[item.file] = rows, sum(journal.seconds for journal in journals)
        return self._read[item.file]
