"""A classifier judged in a minute: PGD where it still stands, APGD on what that left, and a margin on all.

An image leaves an attack when it is misclassified, and those that are left fill the batches. So the numbers are
accuracies under "any iterate of any attack so far", a little lower than those of last iterates. All models are attacked
on the same images from the same random starts: what they are compared by is paired by image and by seed.
Shapes: B images, R rows, K classes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mimir_fast.attacks.losses import margin
from mimir_fast.attacks.pgd import cross_entropy, image_bounds, is_correct, pgd, random_start
from mimir_fast.attacks.rows import run_rows, select_all
from mimir_fast.attacks.threat_model import LinfThreat
from mimir_fast.attacks.until_broken import apgd_many
from mimir_fast.data import DataConfig
from mimir_fast.evaluation.images import EvaluationImages, load_images
from mimir_fast.layers.borrowing import borrowed
from mimir_fast.models.classifier import load_classifier
from mimir_fast.models.weight_files import read_weights
from mimir_fast.ops.linf_step import linf_step
from mimir_fast.reproduction.stages import Judge


@dataclass(frozen=True)
class QuickJudge(Judge):
    """By what a classifier is judged here, in place of the evaluation's suite.

    Attributes:
        num_images: test images of natural and PGD-20 accuracy, evenly spaced; None for all.
        autoattack_images: evenly spaced ones of them for APGD-CE, targeted APGD and the margin.
        apgd_steps, apgd_targets: steps of each search, and target classes.
    """

    apgd_steps: int = 100
    apgd_targets: int = 9


class PgdRows:
    """PGD as a search on rows, see `rows.Rows`: from a random start, α = ε/4."""

    def __init__(self, module: nn.Module, images: Tensor, labels: Tensor, start: Tensor, eps: float, steps: int):
        self.module, self.labels, self.images, self.x, self.eps = module, labels, images, start, eps
        self.low, self.high = image_bounds(images, eps)
        self.steps, self.taken = steps, 0

    def finished(self) -> bool:
        """Whether the point after the last step was looked at."""
        return self.taken > self.steps

    def step(self) -> tuple[Tensor, Tensor]:
        """Look at a point, and step from it unless it is the last."""
        here, last = self.x, self.taken == self.steps
        self.taken += 1
        with torch.set_grad_enabled(not last):
            x = here.detach().requires_grad_(not last)
            logits = self.module(x)
            if not last:
                (grad,) = torch.autograd.grad(cross_entropy(logits, self.labels).sum(), x)
                moved = linf_step(here, grad, self.images, alpha=self.eps / 4, eps=self.eps)
                self.x = moved.clamp(self.low, self.high)
        return ~is_correct(logits.detach(), self.labels), here

    def select(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        select_all(self, rows, "labels", "images", "x", "low", "high")


@torch.no_grad()
def judge_quickly(
    run: Path, data: DataConfig, rules: QuickJudge, device: torch.device
) -> tuple[dict[str, list[int]], dict[str, float]]:
    """Accuracies {measure: [correct, total]} of a run's last weights, and {"margin": mean}.

    Measures: `natural` and `pgd20` on all images; `apgd` on the few, right under PGD-20 and both forms of APGD. The
    margin is the true logit less the largest other at PGD-20's last iterate, on the few; broken images have one too.

    Raises:
        ValueError: the model's outputs are no numbers.
    """
    model = load_classifier(read_weights(run, "model")).to(device)
    images = load_images(data)
    images = images if rules.num_images is None else images.evenly(rules.num_images)
    seed, eps, size = rules.seed, rules.eps, rules.batch_size
    few = torch.zeros(len(images), dtype=torch.bool)
    few[torch.arange(rules.autoattack_images) * len(images) // max(rules.autoattack_images, 1)] = True
    with borrowed(model, "eval") as module:
        logits = torch.cat([module(x).cpu() for x, _, _ in images.batches(size, device)])
        if not bool(logits.isfinite().all()):
            raise ValueError(f"the model of {run} returns logits that are not finite (NaN or inf) on clean images")
        stands = is_correct(logits, images.labels)
        natural = int(stands.sum())
        for at, (x, y, samples) in _batches(images, stands, size, device):
            search = PgdRows(module, x, y, random_start(x, eps, samples=samples, seed=seed), eps, 20)
            broken, _ = run_rows(search, at.to(device))
            stands[broken.cpu()] = False
        pgd20 = int(stands.sum())
        threat = LinfThreat(eps=eps, alpha=eps / 4, num_steps=20)
        margins = []
        for _, (x, y, samples) in _batches(images, few, size, device):
            attacked = pgd(module, x, y, threat, samples=samples, seed=seed, mode="eval")
            margins.append(-margin(module(attacked), y))
        for loss in (cross_entropy, None):  # None: at several targets
            for at, (x, y, samples) in _batches(images, stands & few, size, device):
                attacked = apgd_many(
                    module, x, y, eps, rules.apgd_steps, loss=loss, num_targets=rules.apgd_targets, samples=samples,
                    seed=seed, rows=size,
                )  # fmt: skip
                stands[at] = is_correct(module(attacked), y).cpu()
    counts = {"natural": [natural, len(images)], "pgd20": [pgd20, len(images)]}
    if margins:
        return counts | {"apgd": [int((stands & few).sum()), int(few.sum())]}, {
            "margin": torch.cat(margins).mean().item()
        }
    return counts, {}


def _batches(
    images: EvaluationImages, chosen: Tensor, size: int, device: torch.device
) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor, Tensor]]]:
    """(positions, (images, labels, samples) on the device) of those chosen, (N,) bool, at this moment."""
    positions = chosen.nonzero()[:, 0]
    # Of nothing, `split` makes one empty part, and `batches` none.
    return zip(positions.split(size), images.take(positions).batches(size, device), strict=False)
