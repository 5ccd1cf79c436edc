"""The report's further parts, each giving (numbers for `extras`, pictures); empty where a part does not apply."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from mimir_fast.attacks.adaptive import has_features
from mimir_fast.attacks.pgd import pgd
from mimir_fast.attacks.threat_model import LinfThreat
from mimir_fast.evaluation import figures
from mimir_fast.evaluation.config import SUITES
from mimir_fast.evaluation.images import EvaluationImages
from mimir_fast.evaluation.job import Job
from mimir_fast.evaluation.loss_surface import loss_surface
from mimir_fast.evaluation.mi_bounds import along_curve
from mimir_fast.evaluation.models import Opaque
from mimir_fast.evaluation.named_attacks import step_size
from mimir_fast.evaluation.reconstruction import judge_reconstruction, load_masked_autoencoder, reconstruct
from mimir_fast.evaluation.report import Picture
from mimir_fast.evaluation.results import Results
from mimir_fast.ops.renyi_mi import renyi_mi

Part = tuple[dict[str, Any], list[Picture]]
SURFACE_IMAGES = 128


def reconstruction(job: Job, few: EvaluationImages, results: Results) -> Part:
    """The attack on the masked autoencoder's reconstruction, where one was given."""
    config = job.config
    if config.pretrained is None:
        return {}, []
    model, norm_pix = load_masked_autoencoder(config.pretrained)
    threat = LinfThreat(eps=config.eps, alpha=step_size(config.eps, 20), num_steps=20)
    found = judge_reconstruction(
        model.to(job.device), few, threat, batch_size=config.batch_size, device=job.device, seed=config.seed,
        norm_pix=norm_pix,
    )  # fmt: skip
    return {"reconstruction": {**asdict(found), "parameters": asdict(threat)}}, []


def loss_surfaces(job: Job, few: EvaluationImages, results: Results) -> Part:
    """The loss around the weights, on clean and on attacked images."""
    points, module = SUITES[job.config.suite].surface_points, job.judged.module
    if points == 0 or isinstance(module, Opaque):
        return {}, []
    x, y, samples = next(few.batches(min(SURFACE_IMAGES, len(few)), job.device))
    attacked = _attacked(job, x, y, samples, job.config.eps)
    numbers, pictures = {}, []
    for name, images in (("clean", x), ("attacked", attacked)):
        found = loss_surface(module, images, y, num_points=points, seed=job.config.seed)
        numbers[name] = {"steps": found.steps.tolist(), "loss": found.loss.tolist()}
        caption = f"Mean loss of {len(x)} {name} images around the weights, filter-normalised directions."
        pictures.append(Picture("Loss surface", figures.surface(found, f"{name} images"), caption))
    return {"loss_surface": numbers}, pictures


def mutual_information_figure(job: Job, few: EvaluationImages, results: Results) -> Part:
    """Bounds on I(x+δ, z) along the ε curve, and an estimate where the model shows its features."""
    if not SUITES[job.config.suite].mi:
        return {}, []
    pairs = list(zip(results.curve["eps"], results.curve["accuracy"], strict=True))
    zeros = [i for i, (_, accuracy) in enumerate(pairs) if accuracy == 0]
    curve = dict(pairs[: zeros[0] + 1] if zeros else pairs)  # beyond the first zero the bounds say nothing more
    reconstructed, words = None, "H(F) in place of the reconstruction's (give --pretrained for that)"
    x, y, samples = next(few.batches(min(256, len(few)), job.device))
    if job.config.pretrained is not None:
        autoencoder, norm_pix = load_masked_autoencoder(job.config.pretrained)
        pictures = reconstruct(autoencoder.to(job.device), x, samples, job.config.seed, norm_pix)
        with torch.no_grad():
            reconstructed = job.judged.module(pictures).argmax(dim=1).cpu()
        words = "the classes seen in the masked autoencoder's reconstructions"
    bounds = along_curve(curve, few.labels, job.source.num_classes, reconstructed)
    estimate = _estimates(job, x, y, samples) if has_features(job.judged.module) else {}
    numbers = {**asdict(bounds), "upper_from": words, "renyi_bits": {str(eps): v for eps, v in estimate.items()}}
    caption = "Bounds of I(x+δ, z) in bits against ε; the estimate is the matrix-based Rényi one of order 2."
    return {"mi": numbers}, [Picture("Mutual information", figures.bounds(bounds, estimate), caption)]


def _estimates(job: Job, x: Tensor, y: Tensor, samples: Tensor) -> dict[float, float]:
    estimates = {}
    for radius in (0.0, job.config.eps, min(1.0, 2 * job.config.eps)):
        images = _attacked(job, x, y, samples, radius)
        with torch.no_grad():
            features = job.judged.module.forward_features(images)  # type: ignore[operator]
            estimates[radius] = float(renyi_mi(images, features.float()))
    return estimates


def _attacked(job: Job, x: Tensor, y: Tensor, samples: Tensor, eps: float) -> Tensor:
    threat = LinfThreat(eps=eps, alpha=step_size(eps, 10), num_steps=10)
    return pgd(job.judged.module, x, y, threat, samples=samples, seed=job.config.seed, mode="eval")
