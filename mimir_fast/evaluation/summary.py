"""From saved measurements to results and pictures, on the main process.

Everything but a few pictures is read from disk, so a summary can be made again at no cost.
"""

import json
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from mimir_fast.attacks.adaptive import has_features
from mimir_fast.attacks.pgd import pgd
from mimir_fast.attacks.threat_model import LinfThreat
from mimir_fast.evaluation import figures, masking_checks
from mimir_fast.evaluation.accuracy import Count
from mimir_fast.evaluation.config import SUITES
from mimir_fast.evaluation.corruption_plan import summarize_corruptions
from mimir_fast.evaluation.extras import loss_surfaces, mutual_information_figure, reconstruction
from mimir_fast.evaluation.images import EvaluationImages
from mimir_fast.evaluation.job import Job
from mimir_fast.evaluation.masking_checks import Verdict
from mimir_fast.evaluation.named_attacks import step_size
from mimir_fast.evaluation.plan import Measurement, curve_radii, main_attacks, plan, radius_key
from mimir_fast.evaluation.report import Picture
from mimir_fast.evaluation.results import Results, birth_certificate, headline

NUM_EXAMPLES = 4


def summarize(job: Job, notes: list[str]) -> tuple[Results, list[Picture]]:
    """(results, pictures) of a finished evaluation."""
    config = job.config
    measured = {item.name: item for item in plan(config, has_features(job.judged.module))}
    results = Results(choices=choices(job), environment=birth_certificate(), notes=list(notes))
    pictures: list[Picture] = []
    few = job.shard(0).evenly(SUITES[config.suite].check_images)
    results.images = {
        "source": job.source.name, "split": "test", "count": len(job.indices), "classes": job.source.num_classes,
        "indices": job.indices.tolist(), "skipped": few.skipped,
    }  # fmt: skip
    results.accuracy = accuracies(job)
    if config.wants_autoattack:
        results.autoattack = autoattack_summary(job)
    results.checks = [asdict(verdict) for verdict in check(job, measured, few, results)]
    results.curve = curve(job, measured)
    pictures += _check_pictures(job, measured, results)
    results.corruptions, more = summarize_corruptions(job)
    pictures += more
    for part in (reconstruction, loss_surfaces, mutual_information_figure):
        found, more = part(job, few, results)
        results.extras |= found
        pictures += more
    pictures += examples(job, few)
    if config.suite == "full" and config.corruptions is None:
        from mimir_fast.evaluation.corruptions import WHERE_TO_GET

        results.notes.append(f"Common corruptions were left out. {WHERE_TO_GET}, or --corruptions generated.")
    results.verdict = headline(results)
    return results, pictures


def choices(job: Job) -> dict[str, Any]:
    """The resolved configuration and what follows from it."""
    return {
        **asdict(job.config),
        "eps_text": job.config.eps_text,
        "model_kind": job.judged.kind,
        "preprocessing": job.judged.preprocessing,
        "weights_sha256": job.identity["weights"],
        "num_shards": job.num_shards,
        "device": str(job.device),
        "precision": "fp32, no TF32, no autocast",
    }


def accuracies(job: Job) -> dict[str, dict[str, Any]]:
    """The rows of the first table."""
    table = {}
    for attack in main_attacks(job.config, has_features(job.judged.module)):
        found = job.gather(attack.name, attack.parameters)
        correct = found.values["correct"]
        count = Count(int(correct.sum()), len(correct))
        table[attack.name] = {
            "label": attack.label,
            **asdict(count),
            "accuracy": count.accuracy,
            "standard_error": count.standard_error,
            "mean_loss": float(found.values["loss"].mean()),
            "largest_linf": float(found.values["linf"].max()),
            "parameters": attack.parameters,
            "seconds": found.seconds,
            "bounds_robustness": attack.name != "natural",
        }
    return table


def autoattack_summary(job: Job) -> dict[str, Any]:
    """AutoAttack over all shards."""
    states = [json.loads(job.path("autoattack", k, "json").read_text()) for k in range(job.num_shards)]
    stages = max((state["after"] for state in states), key=len)
    # A shard with nothing left standing skips the later stages.
    after = {stage: sum(state["after"].get(stage, 0) for state in states) for stage in stages}
    total, correct = len(job.indices), list(after.values())[-1]
    count = Count(correct, sum(len(state["broken_by"]) for state in states) or total)
    return {
        "version": job.config.autoattack_version,
        "eps": job.config.eps,
        **asdict(count),
        "accuracy": count.accuracy,
        "standard_error": count.standard_error,
        "after": after,
        "seconds": {
            stage: sum(state["seconds"].get(stage, 0.0) for state in states) for stage in stages if stage != "clean"
        },
        "warnings": sorted({warning for state in states for warning in state["warnings"]}),
        "seed": job.config.seed,
    }


def check(job: Job, measured: dict[str, Measurement], few: EvaluationImages, results: Results) -> list[Verdict]:
    """All gradient-masking verdicts."""
    suite = SUITES[job.config.suite]

    def of(name: str, value: str = "correct") -> Tensor:
        item = measured[name]
        return job.gather(item.file, item.attack.parameters, item.images).values[value]

    x, y, _ = next(few.batches(min(len(few), job.config.batch_size), job.device))
    strongest = f"steps_{suite.check_steps[-1]}"
    white = of(strongest) * of("check_apgd50")
    radii = [radius for radius in curve_radii(job.config) if radius >= job.config.eps]
    verdicts = [
        masking_checks.loss_rises_with_steps({k: of(f"steps_{k}", "loss") for k in suite.check_steps}),
        masking_checks.iterative_beats_one_step(of("check_fgsm"), of(strongest)),
        masking_checks.black_box_never_beats_white_box(white, of("check_square")),
        masking_checks.unbounded_attack_succeeds(
            {radius: of(_curve_name("curve", radius)) for radius in radii}, 1 / job.source.num_classes
        ),
        masking_checks.gradient_beats_noise(of("check_fgsm", "loss"), of("check_random", "loss")),
        masking_checks.gradients_exist(masking_checks.zero_gradients(job.judged.module, x, y)),
    ]
    if results.autoattack and results.autoattack["warnings"]:
        sentence = " ".join(results.autoattack["warnings"])
        verdicts.append(Verdict("AutoAttack's own checks", False, sentence))
    return verdicts


def _curve_name(kind: str, radius: float) -> str:
    return f"{kind}_{radius_key(radius)}"


def curve(job: Job, measured: dict[str, Measurement]) -> dict[str, Any]:
    """Accuracy along ε, under PGD and under random noise, on the images of the checks; ε = 0 first."""

    def accuracy(name: str) -> float:
        item = measured[name]
        return float(job.gather(item.file, item.attack.parameters, item.images).values["correct"].mean())

    radii, natural = curve_radii(job.config), accuracy("check_natural")
    return {
        "eps": [0.0, *radii],
        "accuracy": [natural, *(accuracy(_curve_name("curve", radius)) for radius in radii)],
        "noise": [natural, *(accuracy(_curve_name("noise", radius)) for radius in radii)],
        "num_steps": SUITES[job.config.suite].curve_steps,
    }


def _check_pictures(job: Job, measured: dict[str, Measurement], results: Results) -> list[Picture]:
    found = results.curve
    count = len(job.gather(measured["check_natural"].file, {}, "checks").values["correct"])
    under = dict(zip(found["eps"], found["accuracy"], strict=True))
    noise = dict(zip(found["eps"], found["noise"], strict=True))
    losses = next(c["numbers"]["mean_loss"] for c in results.checks if c["name"] == "loss rises with steps")
    return [
        Picture(
            "How accuracy falls with ε",
            figures.accuracy_curve(under, noise, job.config.eps, count),
            f"Accuracy on {count} images against ε (PGD-{found['num_steps']}); the band is two standard errors.",
        ),
        Picture(
            "Are the gradients honest?",
            figures.loss_against_steps(losses),
            f"Mean loss at the end of PGD against its number of steps, {count} images.",
        ),
    ]


def examples(job: Job, few: EvaluationImages) -> list[Picture]:
    """A few attacked images, those first that the attack broke."""
    eps, names = job.config.eps, few.classes
    threat = LinfThreat(eps=eps, alpha=step_size(eps, 20), num_steps=20)
    x, y, samples = next(few.batches(min(32, len(few)), job.device))
    adversarial = pgd(job.judged.module, x, y, threat, samples=samples, seed=job.config.seed, mode="eval")
    with torch.no_grad():
        before, after = (job.judged.module(images).softmax(dim=1).max(dim=1) for images in (x, adversarial))
    order = torch.argsort(((before.indices == y) & (after.indices != y)).int(), descending=True, stable=True)
    chosen = order[:NUM_EXAMPLES]

    def words(found: Any, i: int) -> str:
        return f"{names[int(found.indices[i])][:14]}, {100 * float(found.values[i]):.0f} %"

    titles = [(words(before, i), words(after, i)) for i in chosen.tolist()]
    png = figures.attack_examples(x[chosen].cpu(), adversarial[chosen].cpu(), titles, magnify=max(1.0, 0.25 / eps))
    caption = f"Image, perturbation, attacked image with what the model sees (PGD-20, ε = {job.config.eps_text})."
    return [Picture("Examples", png, caption)]
