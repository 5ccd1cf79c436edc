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
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from mimir_fast.attacks.pgd import check_images, is_correct
from mimir_fast.attacks.until_broken import first_to_fool
from mimir_fast.evaluation.adapters import given_model
from mimir_fast.evaluation.attacks import attack_averaged, make_threat
from mimir_fast.evaluation.measure import strict_fp32
from mimir_fast.evaluation.options import Norm
from mimir_fast.evaluation.sanity import inspect_model
from mimir_fast.evaluation.statistics import Count
from mimir_fast.layers.borrowing import borrowed
from mimir_fast.sizes import as_size
from mimir_fast.validation import check_number


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
        model: a module or another callable, images (B, C, H, W) in [0, 1] → logits (B, K). It is attacked in eval mode
            and left as it was, and is no part of the metric: not moved, and not saved with it.
        norm, eps: the ball; eps = 0 gives the accuracy without attack. Left out: 8/255 for linf.
        num_steps, alpha, restarts: of PGD; alpha left out: ε/4, as `mimir_fast.evaluate` has it.
        draws: passes that each gradient is the mean of, more than 1 for a random model.
        seed: of the random starts. A start is a function of seed and image, so neither batches nor their order matter.
        options: torchmetrics' own, where it is installed.
    Raises:
        ValueError: a number is out of range, or the norm is not linf and there is no eps.
    """

    is_differentiable, higher_is_better, full_state_update = False, True, False
    correct: Tensor
    total: Tensor

    def __init__(
        self, model: nn.Module | Callable[[Tensor], Any], *, norm: Norm = "linf", eps: float | None = None,
        num_steps: int = 20,
        alpha: float | None = None, restarts: int = 1, draws: int = 1, seed: int = 0, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(**options)
        for name, value in (("num_steps", num_steps), ("restarts", restarts), ("draws", draws)):
            check_number(name, value, at_least=1)
        if eps is None and norm != "linf":
            raise ValueError(f"norm={norm} needs eps: balls of different norms have different sizes")
        eps = 8 / 255 if eps is None else eps
        self._model = (model,)  # in a tuple, so that it is no submodule of a metric of torchmetrics
        self._seen = False
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
            ValueError: images are of another shape, type or range, or, at the first update, the model gives no logits
                or no gradient, as for `mimir_fast.evaluation.evaluate`.
        """
        check_images(images)
        model, samples = self._look(images), _samples_of(images)
        labels = torch.as_tensor(labels, device=images.device)
        with strict_fp32(images.device), borrowed(model, "eval") as module, torch.no_grad():
            right = is_correct(module(images), labels)

            def attempt(rows: Tensor, starts: Tensor) -> Tensor:
                return attack_averaged(
                    model, images[rows], labels[rows], self.threat, draws=self.draws, samples=samples[rows],
                    seed=self.seed, step=starts,
                )  # fmt: skip

            if self.threat.eps > 0:
                attacked = first_to_fool(module, images, labels, attempt, self.restarts)
                right &= is_correct(module(attacked), labels)
        self.correct = self.correct + right.sum().to(self.correct.device)
        self.total = self.total + len(labels)

    def _look(self, images: Tensor) -> nn.Module:
        """The model, wrapped if need be; looked at before it is first attacked."""
        if not self._seen:
            judged = given_model(
                self._model[0], device=images.device, channels=images.shape[1], image_size=as_size(images.shape[2:])
            )
            with strict_fp32(images.device), borrowed(judged.module, "eval") as module:
                inspect_model(module, images[:8])
            self._model, self._seen = (judged.module,), True
        return cast(nn.Module, self._model[0])

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
