"""The whole evaluation: plan, measure shard by shard, summarise, render.

    OUTPUT_DIR/results.json  report.html    progress/plan.json  progress/<measurement>.<shard>of<shards>.jsonl

config → model, images → sanity → topics' measurements (resumable) → topics' numbers → results.json, report.html

The number of shards is fixed by the processes of the first start; later starts deal the same shards to however many
processes there are. All processes must see the same folder: the main one waits for the others by reading it.
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from mimir_fast.attacks.adaptive import has_features
from mimir_fast.checkpoints.durable import remove, write_text
from mimir_fast.data.sources import build_source
from mimir_fast.data.sources.base import ImageSource
from mimir_fast.evaluation.adapters import JudgedModel, load_model
from mimir_fast.evaluation.config import EvaluateConfig
from mimir_fast.evaluation.images import Fitting, ImageSets, choose_indices, fitting_for, load_from
from mimir_fast.evaluation.journal import fingerprint
from mimir_fast.evaluation.measure import Records, ShardRun, strict_fp32
from mimir_fast.evaluation.options import SUITE_LIMITS
from mimir_fast.evaluation.progress import TimeLeft
from mimir_fast.evaluation.report import render
from mimir_fast.evaluation.results import PACKAGES, Results, birth_certificate, command_of, conclude
from mimir_fast.evaluation.sanity import Sanity, inspect_model
from mimir_fast.evaluation.topic import Setup, Topic, all_topics
from mimir_fast.models.facts import Asked
from mimir_fast.training.distributed import World, start_world, stop_world
from mimir_fast.versions import version_of

Log = Callable[[str], None]
EOT_DRAWS = 10
"""Of a random model that a gradient of PGD is the mean of."""


@dataclass
class Given:
    """What is evaluated, where Python has it in memory and no option names it.

    Attributes:
        identity: of the images; JSON-able.
        command: what stands in the report as the way to the same numbers.
    """

    model: JudgedModel
    source: ImageSource
    identity: dict[str, Any]
    command: str


@dataclass
class Job:
    """What stays the same while an evaluation runs.

    Attributes:
        model: the evaluated model.
        indices: (N,) positions of the evaluated images in the test split.
        identity: what all numbers depend on; JSON-able.
        topics: in the order of the report.
        records: the measurements of each topic, and their rows on disk.
        notes: what the reader must know of the model.
        command: what to type to repeat it.
        sanity: the first look at the model.
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
        f"{job.model.kind} {config.checkpoint}{words}: {len(job.indices)} images of {job.source.name}, "
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
    log("\n".join(["", *lines, *results.notes, f"{config.folder / 'report.html'}"]))
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
    x, _, _ = next(load_from(source, config.data, indices[:8], fitting).batches(8, world.device))
    with strict_fp32(world.device):
        sanity = inspect_model(model.module, x, source.num_classes, source.name)

    notes = [*model.notes, *sanity.notes()]
    if not sanity.deterministic and config.eot is None:
        config = replace(config, eot=EOT_DRAWS)

    def load_other(spec: str) -> nn.Module:
        other = load(spec)
        inspect_model(other.module, x, source.num_classes, source.name)
        assumed = [] if other.report is None or not other.report.assumed else [other.report.assumption]
        notes.extend(f"{spec}: {note}" for note in [*other.notes, *assumed])
        return other.module

    features, topics = has_features(model.module), all_topics()
    trial = ImageSets(source, config.data, np.unique(indices[[0, -1]]), 1, fitting)
    setup = Setup(config, len(indices), source.classes, features, not model.opaque, load_other, trial)
    for topic in topics:
        topic.check(setup)
    identity = identity_of(config, model, indices, fitting) | (given.identity if given else {})
    for topic in topics:
        identity |= topic.identity(setup)
    num_shards = open_folder(config, identity, min(world.size, len(indices)), main=world.is_main)
    sets = ImageSets(source, config.data, indices, num_shards, fitting)
    plan = {topic.name: topic.measurements(setup) for topic in topics}
    records = Records(config.folder / "progress", num_shards, plan)
    command = given.command if given else command_of(config)
    return Job(
        config, model, setup, source, indices, identity, sets, topics, records, world.device, notes, command, sanity
    )  # fmt: skip


def identity_of(config: EvaluateConfig, model: JudgedModel, indices: np.ndarray, fitting: Fitting) -> dict[str, Any]:
    """What the numbers of all topics depend on: model, code, images, packages."""
    root, size = config.data.root, config.data.image_size
    return {
        "checkpoint": model.name,
        "weights": model.digest(),
        "outputs": config.outputs,
        "preprocessing": model.preprocessing,
        "data": {
            "source": config.data.source, "root": root and str(Path(root).expanduser().resolve()),
            "size": list(size) if isinstance(size, tuple) else size, "channels": config.data.channels,
            **fitting.as_dict(),
        },
        "indices": hashlib.sha256(indices.tobytes()).hexdigest()[:16],
        "num_images": len(indices),
        "norm": config.norm,
        "packages": {name: version_of(name) for name in ("mimir-fast", "torch", "timm", *PACKAGES)},
    }  # fmt: skip


def open_folder(config: EvaluateConfig, identity: dict[str, Any], num_shards: int, *, main: bool) -> int:
    """Make the folder ready on the main process; returns the number of shards that holds in it.

    Raises:
        ValueError: the folder holds the evaluation of another model or of other images, or something else.
    """
    progress = config.folder / "progress"
    plan = progress / "plan.json"
    if main:
        if not plan.exists() and config.folder.exists() and any(config.folder.iterdir()):
            raise ValueError(f"{config.folder} is not empty and holds no evaluation of ours: give another --output_dir")
        if config.overwrite and plan.exists():
            remove(progress)
        progress.mkdir(parents=True, exist_ok=True)
        if not plan.exists():
            write_text(plan, json.dumps({"num_shards": num_shards, "identity": identity}, indent=1) + "\n")
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()  # all are at their start: this one waits for seconds
    saved = json.loads(plan.read_text())
    if fingerprint(saved["identity"]) != fingerprint(identity):
        changed = [name for name in identity if saved["identity"].get(name) != identity[name]]
        listing = "; ".join(f"{name}: {saved['identity'].get(name)} -> {identity[name]}" for name in changed)
        raise ValueError(
            f"{config.folder} holds the evaluation of something else ({listing}); give another --output_dir, or "
            "--overwrite to start anew there"
        )
    return int(saved["num_shards"])


def run_shard(job: Job, number: int, clock: TimeLeft, log: Log) -> None:
    """All measurements of one shard; those that are on disk are not repeated."""
    config, skipped = job.config, dict[str, str]()
    for item in job.records.items():
        images = job.sets.shard(item.images, number, item.make_set)
        skipped |= images.skipped
        settings = {
            **job.identity, "images": item.images, "batch_size": config.batch_size, "attack": item.parameters
        }  # fmt: skip
        tick = clock.ticker(item, len(images), log)
        how = ShardRun(config.batch_size, job.device, job.records.path(item, number), settings, tick, log)
        record = item.run(job.model.module, images, how)
        clock.finished()
        right = record.values.get("correct")
        share = f"{100 * sum(right) / len(right):.2f} % ({sum(right)}/{len(right)})" if right else ""
        log(f"{item.file:>24}  {share:<24} {record.seconds:7.1f} s")
    write_text(job.done(number), json.dumps({"plan": job.plan_mark, "skipped": skipped}) + "\n")


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
    config, model, records = job.config, job.model, job.records
    skipped: dict[str, str] = {}
    for number in range(records.num_shards):
        skipped |= json.loads(job.done(number).read_text())["skipped"]
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
        "precision": "fp32, no TF32, no autocast",
    }
    results.images = {
        "source": job.source.name, "split": "test", "count": len(job.indices) - len(skipped),
        "classes": job.source.num_classes, "indices": job.indices.tolist(), "skipped": skipped,
    }  # fmt: skip
    for topic in job.topics:
        if (numbers := topic.summarize(job.setup, records.items(topic.name), records)) is not None:
            results.sections[topic.name] = numbers
            results.notes += numbers.pop("notes", [])
    if skipped:
        some = next(iter(skipped.items()))
        results.notes.append(f"{len(skipped)} unreadable files were left out, such as {some[0]}: {some[1]}")
    return conclude(results)
