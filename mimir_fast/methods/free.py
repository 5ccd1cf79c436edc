"""Free adversarial training (Shafahi et al., arXiv 1904.12843, Algorithm 1): an adversary at no cost of its own.

Each batch is trained on m times in turn. The backward pass that updates the weights also gives the gradient to the
images, along whose sign the next pass over them goes a step of ε:

    δ ← Π( δ + ε·sign ∇ₓ L(f(x + δ), y) ),   m times, with an update of the weights in each

A pass is a pass: `--epochs 30` are as many steps as of any method, and 30/m passes over the data. δ starts uniformly in
the ball with each batch. The authors begin with the last one of the batch before, which belongs to other images: ours
is a function of (seed, step, sample), and nothing of it has to be saved.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor, nn

from mimir_fast.data.batch import Batch
from mimir_fast.methods.classification import (
    OF_AN_ATTACK,
    ClassificationConfig,
    ClassificationMethod,
    Inputs,
    plain_losses,
)
from mimir_fast.methods.registry import MethodEntry, Pass, register
from mimir_fast.ops.linf_step import linf_step
from mimir_fast.validation import check_number, without


@dataclass
class FreeConfig:
    """Free adversarial training; it applies to method `free` only."""

    replays: int = 4
    """Steps in turn on each batch, m: 8 on CIFAR-10 and 4 on ImageNet in the paper. --epochs counts all of them."""

    def __post_init__(self) -> None:
        check_number("free.replays", self.replays, at_least=2, hint="the first has no gradient yet, only noise")


@dataclass
class FreeObjective(ClassificationConfig):
    """Options of method `free`."""

    free: FreeConfig = field(default_factory=FreeConfig)


class Free(ClassificationMethod):
    """Cross entropy on images that each step of a batch moves for the next one."""

    config: FreeObjective

    def __init__(self, config: FreeObjective) -> None:
        super().__init__(config)
        self.replays, eps = config.free.replays, config.attack.eps
        # What pictures show: the step from the first pass to the second.
        self.attack = replace(config.attack, alpha=eps, num_steps=1, random_start=True, every=1)
        self._trained: list[tuple[Batch, Tensor]] = []

    def adversary(self) -> str:
        """Its radius, and how often a batch is used."""
        return f"eps {255 * self.attack.eps:.3g}/255, {self.replays} steps on each batch"

    def passes(self, model: nn.Module, batches: Sequence[Batch], *, seed: int, step: int) -> list[Pass]:
        """The training passes of a step; of batches that the last step had too, from where its gradients lead."""
        before, self._trained = self._trained, []
        again = len(before) == len(batches) and all(a is b for (a, _), b in zip(before, batches, strict=True))
        points = [point for _, point in before] if again else [None] * len(batches)
        return [
            partial(self._train, model, batch, point, seed, step) for batch, point in zip(batches, points, strict=True)
        ]

    def __call__(self, model: nn.Module, batch: Batch, *, seed: int, step: int) -> dict[str, Tensor]:
        """{"loss", "accuracy"} of one batch, see `passes`."""
        (run,) = self.passes(model, [batch], seed=seed, step=step)
        return run()

    def _train(self, model: nn.Module, batch: Batch, point: Tensor | None, seed: int, step: int) -> dict[str, Tensor]:
        inputs = self.prepare(model, batch, seed=seed, step=step)
        if point is None or point.grad is None:
            x = self.start(inputs)
        else:
            eps = self.attack.eps
            x = linf_step(point.detach(), point.grad, inputs.images, alpha=eps, eps=eps)
        x = x.requires_grad_()
        self._trained.append((batch, x))
        return self.losses(model, replace(inputs, images=x))

    def losses(self, model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
        """{"loss", "accuracy"} of the images as they are."""
        return plain_losses(model, inputs.images, inputs)


register(
    MethodEntry(
        "free", "finetune", FreeObjective, Free, "free adversarial training, a batch several times",
        idle=without(False, "--method free takes its steps of eps from the training passes", *OF_AN_ATTACK),
    )
)  # fmt: skip
