"""Accuracy under PGD as a metric to update batch by batch, in the manner of torchmetrics, which need not be installed.

    robust = RobustAccuracy(model, eps=8 / 255)
    for images, labels in loader:
        robust.update(images, labels)
    robust.compute()                                   # 0-dimensional tensor, 0 … 1
    robust.reset()

Where torchmetrics is installed this is one of its metrics: it goes into a `MetricCollection`, and counts are summed
over processes. Shapes: B images, C channels, H × W pixels.
"""

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mimir_fast.attacks.pgd import is_correct
from mimir_fast.evaluation.attacks import attack_averaged, first_to_fool, make_threat
from mimir_fast.evaluation.measure import strict_fp32
from mimir_fast.evaluation.options import Norm
from mimir_fast.evaluation.statistics import Count
from mimir_fast.layers.borrowing import borrowed


class _Metric:
    """What is used of torchmetrics.Metric."""

    def __init__(self, **options: Any) -> None:
        if options:
            raise TypeError(f"{', '.join(options)}: options of torchmetrics, which is not installed")
        self._defaults: dict[str, Tensor] = {}

    def add_state(self, name: str, default: Tensor, dist_reduce_fx: str | None = None) -> None:
        """A tensor that `reset` sets back; over processes nothing is reduced here."""
        self._defaults[name] = default
        setattr(self, name, default.clone())

    def reset(self) -> None:
        """Forget what was counted."""
        for name, default in self._defaults.items():
            setattr(self, name, default.clone())

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Count a batch too, and return its own value."""
        before = {name: getattr(self, name) for name in self._defaults}
        self.reset()
        self.update(images, labels)
        value = self.compute()
        for name, count in before.items():
            setattr(self, name, count + getattr(self, name))
        return value

    def update(self, images: Tensor, labels: Tensor) -> None:
        """Count a batch."""
        raise NotImplementedError

    def compute(self) -> Tensor:
        """The value of all that was counted."""
        raise NotImplementedError


if TYPE_CHECKING:
    Metric = _Metric
else:
    try:
        from torchmetrics import Metric
    except ImportError:
        Metric = _Metric


class RobustAccuracy(Metric):
    """Share of the images that are classified correctly as they are and after every PGD attack on them.

    Args:
        model: a module, images (B, C, H, W) in [0, 1] → logits (B, K). It is attacked in eval mode and left as it was,
            and is no part of the metric: not moved, and not saved with it.
        norm, eps: the ball; eps = 0 gives the accuracy without attack.
        num_steps, alpha, restarts: of PGD; alpha left out: ε/4, as `mimir_fast.evaluate` has it.
        draws: passes that each gradient is the mean of, more than 1 for a random model.
        seed: of the random starts. A start is a function of seed and image, so neither batches nor their order matter.
        options: torchmetrics' own, where it is installed.
    """

    is_differentiable, higher_is_better, full_state_update = False, True, False
    correct: Tensor
    total: Tensor

    def __init__(
        self, model: nn.Module, *, norm: Norm = "linf", eps: float = 8 / 255, num_steps: int = 20,
        alpha: float | None = None, restarts: int = 1, draws: int = 1, seed: int = 0, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(**options)
        self._model = (model,)  # in a tuple, so that it is no submodule of a metric of torchmetrics
        self.threat = make_threat(norm, eps, num_steps, alpha)
        self.restarts, self.draws, self.seed = restarts, draws, seed
        self.add_state("correct", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")
        # A collection of torchmetrics updates one for all of those whose states have one set of names and equal values.
        attack = f"{norm}_{eps}_{num_steps}_{alpha}_{restarts}_{draws}_{seed}"
        self.add_state(re.sub(r"\W", "_", f"attack_{attack}"), torch.tensor(0), dist_reduce_fx="sum")

    def update(self, images: Tensor, labels: Tensor) -> None:
        """Attack images (B, C, H, W) float in [0, 1], and count those whose labels (B,) the model still finds.

        Raises:
            ValueError: images are of another shape, type or range.
        """
        model, samples = self._model[0], _samples_of(images)
        with strict_fp32(images.device), borrowed(model, "eval") as module, torch.no_grad():
            right = is_correct(module(images), labels)
            attempts = (
                attack_averaged(
                    model, images, labels, self.threat, draws=self.draws, samples=samples, seed=self.seed, step=start
                )
                for start in range(self.restarts if self.threat.eps > 0 else 0)
            )
            if self.threat.eps > 0:
                right &= is_correct(module(first_to_fool(module, labels, attempts)), labels)
        self.correct = self.correct + right.sum().to(self.correct.device)
        self.total = self.total + len(labels)

    def compute(self) -> Tensor:
        """0-dimensional float tensor, 0 … 1; NaN before the first update."""
        return self.correct / self.total

    @property
    def count(self) -> Count:
        """Correct images of how many in this process, with Wilson's 95 % interval."""
        return Count(int(self.correct), int(self.total))


def _samples_of(images: Tensor) -> Tensor:
    """(B,) int64: a number for each image, by its pixels."""
    levels = (255 * images.detach()).round().long().flatten(1)
    weights = torch.arange(1, levels.shape[1] + 1, device=images.device) * 2654435761  # Knuth's multiplicative hash
    return (levels * weights).sum(1) & 0x7FFFFFFF
