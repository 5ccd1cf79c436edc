"""The whole evaluation: plan, measure shard by shard, summarise, render.

    OUTPUT_DIR/results.json  report.html    progress/plan.json  progress/<measurement>.<shard>of<shards>.jsonl

config → model, images → sanity → topics' measurements (resumable) → topics' numbers → results.json, report.html

The number of shards is fixed by the processes of the first start; later starts deal the same shards to however many
processes there are. All processes must see the same folder: the main one waits for the others by reading it.
"""

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mimir_fast.attacks.adaptive import has_features
from mimir_fast.attacks.perceptual import layers_with_places
from mimir_fast.attacks.pgd import NO_CLASS
from mimir_fast.checkpoints.durable import write_text
from mimir_fast.data.sources import build_source
from mimir_fast.data.sources.base import ImageSource, lopsided
from mimir_fast.evaluation.adapters import JudgedModel, load_model
from mimir_fast.evaluation.config import EvaluateConfig
from mimir_fast.evaluation.content import digest
from mimir_fast.evaluation.finite import finite
from mimir_fast.evaluation.folder import open_folder
from mimir_fast.evaluation.identity import FIRST, identity_of, identity_of_model
from mimir_fast.evaluation.images import Fitting, ImageSets, choose_indices, fitting_for, load_from
from mimir_fast.evaluation.journal import Journal, OtherMeasurementError, fingerprint
from mimir_fast.evaluation.measure import Measurement, Records, ShardRun, strict_fp32
from mimir_fast.evaluation.options import SUITE_LIMITS
from mimir_fast.evaluation.precision import measured_precision
from mimir_fast.evaluation.progress import TimeLeft
from mimir_fast.evaluation.report import render
from mimir_fast.evaluation.results import Results, birth_certificate, command_of, conclude
from mimir_fast.evaluation.sanity import Sanity, inspect_model
from mimir_fast.evaluation.topic import Numbers, Setup, Topic, all_topics
from mimir_fast.models.facts import Asked
from mimir_fast.training.distributed import World, start_world, stop_world
from mimir_fast.validation import counted

Log = Callable[[str], None]
EOT_DRAWS = 10
"""Of a random model that a gradient of PGD is the mean of."""
RESULT = "accuracy"
"""The topic without which there is nothing to report."""
FEW = 2
"""Measurements of another topic that have a line each on the screen; more have one together."""


@dataclass
class Given:
    """What is evaluated, where Python has it in memory and no option names it.

    Attributes:
        command: what stands in the report as the way to the same numbers.
    """

    model: JudgedModel
    source: ImageSource
    command: str


@dataclass
class Job:
    """What stays the same while an evaluation runs.

    Attributes:
        model: the evaluated model.
        indices: (N,) positions of the evaluated images in the test split.
        identity: what all numbers depend on, as the folder has it; JSON-able.
        topics: in the order of the report.
        records: the measurements of each topic, and their rows on disk.
        notes: what the reader must know of the model.
        command: what to type to repeat it.
        sanity: the first look at the model.
        precision: in which it was seen to compute, in words.
    """

    config: EvaluateConfig
    model: JudgedModel
    setup: Setup
    source: ImageSource
    indices: np.ndarray
    identity: dict[str, Any]
    sets: ImageSets
    topics: list[Topic]
    records: Records
    device: torch.device
    notes: list[str]
    command: str
    sanity: Sanity
    precision: str

    def done(self, shard: int) -> Path:
        """Written when a shard is finished; holds the fingerprint of the plan."""
        return self.records.folder / f"done.{shard}of{self.records.num_shards}.json"

    @property
    def plan_mark(self) -> str:
        """Changes with the plan: an evaluation that is asked for more is not finished by what was done."""
        return fingerprint([[item.file, item.parameters] for item in self.records.items()])


def evaluate(config: EvaluateConfig, *, log: Log = print) -> Results:
    """Run a suite, or go on with an interrupted one; writes results.json and report.html into `config.folder`.

    Args:
        log: told one line a measurement, on the main process.
    Returns:
        the results (on the main process; other ones return empty results).
    Raises:
        ValueError, FileNotFoundError, ImportError: the model, the data or an option does not fit; the message names
            the fix. Nothing has been measured by then.
    """
    world = start_world(config.device)
    try:
        return evaluate_in(world, config, log if world.is_main else lambda line: None)
    finally:
        stop_world()


def evaluate_in(world: World, config: EvaluateConfig, log: Log, given: Given | None = None) -> Results:
    """`evaluate` by processes that know each other already; of `given` model and images, else those of the options."""
    job = prepare(config, world, given)
    words = f", {job.model.weights}" if job.model.weights else ""
    log(
        f"{job.model.kind} {config.checkpoint}{words}: {counted(len(job.indices), 'image')} of {job.source.name}, "
        f"{config.norm}, ε = {config.eps_text}"
    )
    for note in job.notes:
        log(f"note: {note}")
    if job.model.report is not None and world.is_main:
        log(str(job.model.report))
        job.model.report.save(config.folder)
    records = job.records
    clock = TimeLeft(records.folder, records.items(), len(job.indices), records.num_shards, world.rank, world.size)
    for number in range(world.rank, records.num_shards, world.size):
        run_shard(job, number, clock, log)
    if not world.is_main:
        return Results()
    wait_for_shards(job, log)
    results = summarize(job)
    results.write(config.folder / "results.json")
    write_text(config.folder / "report.html", render(results))
    lines = [f"{v['large']}. {v['text']}" for v in results.verdicts.values()]
    log("\n".join(["", *lines, *results.notes, f"report: {config.folder / 'report.html'}"]))
    return results


def prepare(config: EvaluateConfig, world: World, given: Given | None = None) -> Job:
    """Model, images and plan, checked before anything is measured."""
    source = given.source if given else build_source(replace(config.data, limit=None), "test")
    suite_limit = None if config.index_file else SUITE_LIMITS[config.suite]
    limit = config.limit or config.data.limit or suite_limit
    indices = choose_indices(source, None if config.index_file and not config.limit else limit, config.index_file)

    def load(spec: str, **options: Any) -> JudgedModel:
        return load_model(
            spec, num_classes=source.num_classes, device=world.device, channels=config.data.channels,
            image_size=config.data.image_size, **options,
        )  # fmt: skip

    model = given.model if given else load(
        config.checkpoint, weights=config.weights, part=config.part, mean=config.mean, std=config.std,
        probabilities=config.outputs == "probabilities", told=Asked(config.options, config.global_pool),
    )  # fmt: skip
    fitting = fitting_for(model.made_for, config.data.image_size, config.crop, config.interpolation)
    first = load_from(source, config.data, indices[:FIRST], fitting)
    x, _, _ = next(first.batches(FIRST, world.device))

    def inspect(judged: JudgedModel) -> tuple[Sanity, dict[str, Any]]:
        with strict_fp32(world.device):
            found = inspect_model(judged.module, x, source.num_classes, source.name)
        return found, identity_of_model(judged, found.logits, found.largest_difference)

    sanity, known = inspect(model)
    with strict_fp32(world.device):
        precision = measured_precision(model.module, x)
    notes = [*model.notes, *sanity.notes(), *filter(None, [precision.note()])]
    notes += one_sided(source.labels, indices)
    others: dict[str, Any] = {}
    if not sanity.deterministic and config.eot is None:
        config = replace(config, eot=EOT_DRAWS)

    def load_other(spec: str) -> nn.Module:
        other = load(spec)
        _, others[spec] = inspect(other)
        assumed = [] if other.report is None or not other.report.assumed else [other.report.assumption]
        notes.extend(f"{spec}: {note}" for note in [*other.notes, *assumed])
        return other.module

    features, topics = has_features(model.module), all_topics()
    trial = ImageSets(source, config.data, np.unique(indices[[0, -1]]), 1, fitting)
    places = bool(layers_with_places(model.module, x[:2]))
    setup = Setup(config, len(indices), source.classes, features, not model.opaque, load_other, trial, places)
    for topic in topics:
        topic.check(setup)
    identity = {"checkpoint": model.name, **known, "precision": str(precision)}
    identity |= identity_of(config, model.preprocessing, source, indices, fitting)
    identity["data"]["first"] = digest([first.images.numpy().tobytes()])
    for topic in topics:
        identity |= topic.identity(setup)
    num_shards, identity = open_folder(
        config, identity, others, min(world.size, len(indices)), main=world.is_main
    )  # fmt: skip
    sets = ImageSets(source, config.data, indices, num_shards, fitting)
    plan = {topic.name: topic.measurements(setup) for topic in topics}
    records = Records(config.folder / "progress", num_shards, plan)
    command = given.command if given else command_of(config)
    return Job(
        config, model, setup, source, indices, identity, sets, topics, records, world.device, notes, command, sanity,
        str(precision),
    )  # fmt: skip


def one_sided(labels: np.ndarray, indices: np.ndarray) -> list[str]:
    """A note where the chosen images have other shares of the classes than their split, labels (N,)."""
    if not lopsided(labels, indices):
        return []
    classes, chosen = (len(np.unique(each)) for each in (labels, labels[indices]))
    return [
        f"The {len(indices)} evaluated images are of {chosen} of the {classes} classes, in other shares than the whole "
        "split: their accuracies are not its."
    ]


def run_shard(job: Job, number: int, clock: TimeLeft, log: Log) -> None:
    """All measurements of one shard; those that are on disk are not repeated.

    A topic whose measurement raises is left out of the report, which says so: nothing else is lost by it.
    """
    skipped, failed = dict[str, str](), dict[str, str]()
    for topic, items in job.records.plan.items():
        try:
            each, seconds = topic == RESULT or len(items) <= FEW, 0.0
            for item in items:
                record, unreadable = _run_item(job, item, number, clock, log)
                skipped |= unreadable
                seconds += record.seconds
                if each:
                    log(f"{item.name:>24}  {item.said(record):<24} {record.seconds:7.1f} s")
            if not each:
                log(f"{topic:>24}  {counted(len(items), 'measurement'):<24} {seconds:7.1f} s")
        except OtherMeasurementError:
            raise
        except Exception as error:
            if topic == RESULT:
                raise
            failed[topic] = failure(error)
            log(f"{topic} failed: {failed[topic]}")
    whole = job.sets.shard("all", number)
    done = {"plan": job.plan_mark, "skipped": skipped, "failed": failed, "digests": whole.digests}
    write_text(job.done(number), json.dumps(done) + "\n")


def _run_item(
    job: Job, item: Measurement, number: int, clock: TimeLeft, log: Log
) -> tuple[Journal, dict[str, str]]:  # fmt: skip
    """One measurement of one shard: its rows, and its unreadable files."""
    config, images = job.config, job.sets.shard(item.images, number, item.make_set)
    settings = {**job.identity, "images": item.images, "batch_size": config.batch_size, "attack": item.parameters}
    tick = clock.ticker(item, len(images), log)
    how = ShardRun(config.batch_size, job.device, job.records.path(item, number), settings, tick, log)
    record = item.run(job.model.module, images, how)
    clock.finished()
    return record, images.skipped


def wait_for_shards(job: Job, log: Log, every: float = 0.2) -> None:
    """Until every shard is finished; the others' progress is read from the folder, so no process waits in a barrier."""
    missing, told = list(range(job.records.num_shards)), time.monotonic()
    while missing := [number for number in missing if not _is_done(job, number)]:
        if time.monotonic() - told > 60:
            log(f"waiting for {len(missing)} of {job.records.num_shards} shards of other processes: {missing[:8]}")
            told = time.monotonic()
        time.sleep(every)


def _is_done(job: Job, number: int) -> bool:
    path = job.done(number)
    return path.exists() and json.loads(path.read_text())["plan"] == job.plan_mark


def summarize(job: Job) -> Results:
    """Results of a finished evaluation, from its files alone."""
    config, model = job.config, job.model
    skipped, failed, digests = dict[str, str](), dict[str, str](), dict[str, str]()
    for number in range(job.records.num_shards):
        done = json.loads(job.done(number).read_text())
        skipped |= done["skipped"]
        failed |= done["failed"]
        digests |= done["digests"]
    records = job.records.without(failed)
    results = Results(environment=birth_certificate(), notes=list(job.notes), command=job.command)
    results.choices = {
        **asdict(config),
        "eps_text": config.eps_text,
        "model_kind": model.kind,
        "preprocessing": model.preprocessing,
        "fitting": {k: v for k, v in job.identity["data"].items() if k in asdict(Fitting())},
        "weights_judged": model.weights,
        "weights_sha256": job.identity["weights"],
        "num_shards": records.num_shards,
        "device": str(job.device),
        "sanity": {
            "deterministic": job.sanity.deterministic,
            "largest_difference": job.sanity.largest_difference,
            "batch_difference": job.sanity.batch_difference,
        },
        "precision": job.precision,
    }
    results.images = {
        "source": job.source.name, "split": "test", "count": len(job.indices) - len(skipped),
        "classes": job.source.num_classes, "indices": job.indices.tolist(), "skipped": skipped, "digests": digests,
    }  # fmt: skip
    for topic in job.topics:
        if topic.name not in failed:
            try:
                _add_section(results, topic, topic.summarize(job.setup, records.items(topic.name), records))
            except Exception as error:
                failed[topic.name] = failure(error)
    results.notes += not_finite(records)
    results.notes += [f"The section {name!r} failed and is left out: {words}" for name, words in failed.items()]
    if skipped:
        some = next(iter(skipped.items()))
        results.notes.append(f"{len(skipped)} unreadable files were left out, such as {some[0]}: {some[1]}")
    if RESULT not in failed:
        return conclude(results)
    for name in ("robustness", "validity"):
        results.verdicts[name] = {"kind": "bad", "large": "No result", "text": failed[RESULT]}
    return results


def _add_section(results: Results, topic: Topic, numbers: Numbers | None) -> None:
    if numbers is not None:
        numbers = finite(numbers)
        json.dumps(numbers, allow_nan=False)
        topic.columns(numbers)
        results.notes += numbers.pop("notes", [])
        results.sections[topic.name] = numbers


def failure(error: Exception) -> str:
    """An error in words, its traceback on the screen."""
    traceback.print_exception(error)
    return f"{type(error).__name__}: {error}"


def not_finite(records: Records) -> list[str]:
    """A note that names the measurements where answers of the model were not finite, none where all were."""
    found = dict[str, str]()
    for item in records.items():
        predictions = records.rows(item).get("prediction", [])
        if count := predictions.count(NO_CLASS):
            found[item.label or item.name] = (
                f"{item.label or item.name}: {count} of {counted(len(predictions), 'image')}"
            )
    if not found:
        return []
    return [
        f"Logits are NaN or infinite ({'; '.join(found.values())}). These images count as misclassified: what breaks "
        "them is the model's arithmetic, not a border between classes."
    ]
