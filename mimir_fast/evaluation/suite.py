"""The whole evaluation: measure shard by shard, then let the main process put everything together.

config → model, images → sanity → per-image measurements and AutoAttack (resumable) → results.json, report.html
"""

from collections.abc import Callable

from mimir_fast.attacks.adaptive import has_features
from mimir_fast.evaluation.accuracy import Count, clean, measure
from mimir_fast.evaluation.autoattack import Progress, run_autoattack
from mimir_fast.evaluation.config import SUITES, EvaluateConfig
from mimir_fast.evaluation.corruption_plan import (
    check_corruptions,
    corrupted_images,
    corruption_parameters,
)
from mimir_fast.evaluation.images import EvaluationImages, choose_indices, load_images
from mimir_fast.evaluation.job import Job, barrier, identity_of, open_folder, open_source
from mimir_fast.evaluation.models import FromProbabilities, load_model
from mimir_fast.evaluation.plan import plan
from mimir_fast.evaluation.report import write_report
from mimir_fast.evaluation.results import Results
from mimir_fast.evaluation.sanity import inspect_model
from mimir_fast.evaluation.summary import summarize
from mimir_fast.training.distributed import World, start_world, stop_world

Say = Callable[[str], None]


def evaluate(config: EvaluateConfig, *, say: Say = print) -> Results:
    """Run a suite, or go on with an interrupted one; writes results.json and report.html into `config.folder`.

    Args:
        say: told one line a measurement, on the main process.
    Returns:
        the results (on the main process; other ones return empty results).
    Raises:
        ValueError, FileNotFoundError, ImportError: the model, the data or an option does not fit; the message says how
            to mend it. Nothing has been spent by then.
    """
    world = start_world(config.device)
    try:
        return _evaluate(config, world, say if world.is_main else _silence)
    finally:
        stop_world()


def _evaluate(config: EvaluateConfig, world: World, say: Say) -> Results:
    job, notes = prepare(config, world)
    say(f"{job.judged.kind} {config.checkpoint}: {len(job.indices)} images of {job.source.name}, ε = {config.eps_text}")
    for note in notes:
        say(f"note: {note}")
    for number in range(world.rank, job.num_shards, world.size):
        run_shard(job, number, say)
    barrier()
    results = Results()
    if world.is_main:
        results, pictures = summarize(job, notes)
        results.write(config.folder / "results.json")
        write_report(config.folder / "report.html", results, pictures)
        say("\n".join(["", *results.verdict, f"{config.folder / 'report.html'}"]))
    barrier()
    return results


def prepare(config: EvaluateConfig, world: World) -> tuple[Job, list[str]]:
    """Model and images, looked at before anything is spent; and what the reader must know."""
    source = open_source(config)
    suite_limit = None if config.index_file else SUITES[config.suite].limit
    limit = config.limit or config.data.limit or suite_limit
    indices = choose_indices(source, None if config.index_file and not config.limit else limit, config.index_file)
    judged = load_model(
        config.checkpoint, num_classes=source.num_classes, device=world.device, channels=config.data.channels
    )
    if config.outputs == "probabilities":
        judged.module = FromProbabilities(judged.module).eval()
    few = load_images(config.data, indices[:8])
    x, _, _ = next(few.batches(8, world.device))
    sanity = inspect_model(judged.module, x, source.num_classes, source.name)
    if config.wants_autoattack and sanity.num_classes < 4:
        raise ValueError(
            f"AutoAttack's targeted DLR loss needs at least 4 classes, {source.name} has {sanity.num_classes}: "
            "add --autoattack no; PGD and APGD with cross entropy work"
        )
    check_corruptions(config)
    notes = [*judged.notes, *([note] if (note := sanity.note()) else [])]
    identity = identity_of(config, judged, indices)
    shards = open_folder(config, identity, min(world.size, len(indices)), main=world.is_main)
    return Job(config, judged, source, indices, identity, shards, world.device), notes


def run_shard(job: Job, number: int, say: Say) -> None:
    """All measurements of one shard; those that are on disk are not repeated."""
    config, model = job.config, job.judged.module
    images = job.shard(number)
    checks = images.evenly(max(1, SUITES[config.suite].check_images // job.num_shards))
    for item in plan(config, has_features(model)):
        record = measure(
            model,
            images if item.images == "all" else checks,
            item.attack.run,
            batch_size=config.batch_size,
            device=job.device,
            journal=job.path(item.file, number),
            settings=job.settings(item.attack.parameters, item.images),
        )
        right = record.tensor("correct")
        say(f"{item.name:>16}  {Count(int(right.sum()), len(right))!s:<24} {record.seconds:7.1f} s")
    if config.wants_autoattack:
        attack_shard(job, number, images, say)
    for name, severity, corrupted in corrupted_images(config, images):
        record = measure(
            model,
            corrupted,
            clean,
            batch_size=config.batch_size,
            device=job.device,
            journal=job.path(f"corrupt_{name}_{severity}", number),
            settings=job.settings(corruption_parameters(config, name, severity)),
        )
        right = record.tensor("correct")
        say(f"{name:>16} {severity}  {Count(int(right.sum()), len(right))}")


def attack_shard(job: Job, number: int, images: EvaluationImages, say: Say) -> Progress:
    """AutoAttack on a shard."""
    config = job.config
    return run_autoattack(
        job.judged.module,
        images,
        config.eps,
        batch_size=config.batch_size,
        device=job.device,
        state=job.path("autoattack", number, "json"),
        seed=config.seed,
        version=config.autoattack_version,
        settings=job.identity,
        say=say,
    )


def _silence(line: str) -> None:
    """Other processes than the main one have nothing to say."""
