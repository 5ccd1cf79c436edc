"""AutoAttack's attacks as searches on rows, which leave when they are broken and are packed into full batches.

The authors' package attacks the images of a batch to the end, one target class after the other, also those that are
broken. Here an attack on an image falls into parts (target classes, restarts), which are handed out in full batches to
the images that still stand (`passes.Attempts`); within a batch an image leaves when one of its rows is misclassified
(`rows.run_rows`). Both are what other attacks until broken use.

The attacks, their steps, targets, restarts and queries are the package's, read from its own objects. Random numbers are
functions of (seed, sample, part) and differ from its: results are equal in law, not bit by bit.

Shapes: R rows, C channels, H × W pixels, K classes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from mimir_fast.attacks.apgd import ball_of, dlr, surface_start, targeted_dlr
from mimir_fast.attacks.apgd_rows import ApgdRows
from mimir_fast.attacks.fab import FabRows
from mimir_fast.attacks.losses import Aimed, likeliest_wrong
from mimir_fast.attacks.passes import Attempts
from mimir_fast.attacks.pgd import Loss, cross_entropy
from mimir_fast.attacks.rows import Rows, run_rows
from mimir_fast.attacks.square import BATCHES_AT_ONCE, SquareRows
from mimir_fast.evaluation.images import EvaluationImages
from mimir_fast.evaluation.options import Norm

FIRST_START = {"apgd-ce": 0, "apgd-dlr": 1000, "apgd-t": 2000}
"""Random starts are numbered, so that no two parts of the attacks share one."""


def has_waves(name: str, norm: Norm, version: str) -> bool:
    """Whether an attack is a search on rows here; the others are the package's objects, batch by batch."""
    norms = {"apgd-ce": ("linf", "l2"), "apgd-dlr": ("linf", "l2"), "apgd-t": ("linf", "l2"), "fab-t": ("linf", "l2"),
             "square": ("linf",)}  # fmt: skip
    return version != "rand" and norm in norms.get(name, ())


@dataclass
class Waves:
    """One attack on the images that stand when it begins.

    Attributes:
        module: takes images in [0, 1], returns logits (R, K); on loan.
        package: the package's AutoAttack object, for its parameters.
        name: of the attack, as the package has it.
    """

    module: nn.Module
    package: Any
    name: str
    norm: Norm
    eps: float
    seed: int
    batch_size: int
    device: torch.device

    @property
    def parts(self) -> int:
        """Into how many the attack on an image falls."""
        if self.name == "apgd-t":
            return int(self.package.apgd_targeted.n_target_classes)
        if self.name == "fab-t":
            return int(self.package.fab.n_target_classes)
        return 1 if self.name == "square" else int(self.package.apgd.n_restarts)

    def run(
        self, shard: EvaluationImages, entered: list[int], stands: Tensor, first: int
    ) -> Iterator[tuple[int, Tensor, Tensor]]:  # fmt: skip
        """Waves from attempt `first` on, as `passes.Attempts` numbers them: the N images that entered, part by part.

        Args:
            entered: positions of the images in the shard.
            stands: (images of the shard,) bool; the caller takes out what a wave has broken.
        Yields:
            (attempts that are done, positions (F,), where (F, C, H, W) they seem to be broken), after each wave.
        """
        places, attempts = torch.tensor(entered, dtype=torch.long), Attempts(len(entered), self.parts, first)
        while len((taken := attempts.take(stands[places], self.batch_size))[0]):
            at, parts = taken
            yield attempts.done, *self._wave(shard, places[at], parts)

    def _wave(self, shard: EvaluationImages, positions: Tensor, parts: Tensor) -> tuple[Tensor, Tensor]:
        images = shard.images[positions].to(self.device).float() / 255
        labels, samples = shard.labels[positions].to(self.device), shard.samples[positions].to(self.device)
        search = self._search(images, labels, samples, parts.to(self.device))
        broken, where = run_rows(search, positions.to(self.device))
        return broken.cpu(), where

    def _search(self, images: Tensor, labels: Tensor, samples: Tensor, parts: Tensor) -> Rows:
        from pyautoattack import checks

        package, norm = self.package, cast(Literal["linf", "l2"], self.norm)
        if self.name == "square":
            return SquareRows(
                self.module, images, labels, samples, self.eps, package.square.n_queries, seed=self.seed,
                most=BATCHES_AT_ONCE * self.batch_size,
            )  # fmt: skip
        if self.name == "fab-t":
            aims = self._targets(images, labels, parts)
            return FabRows(self.module, images, labels, aims, self.eps, package.fab.n_iter, norm)
        start = surface_start(
            images, self.eps, norm, samples=samples, seed=self.seed, step=parts + FIRST_START[self.name]
        )  # fmt: skip
        loss: Loss = {"apgd-ce": cross_entropy, "apgd-dlr": dlr}.get(self.name) or Aimed(
            targeted_dlr, self._targets(images, labels, parts)
        )

        def check(gradient: Tensor) -> None:
            """The package's check, once an image; it makes it for DLR."""
            if self.name != "apgd-ce":
                checks.check_zero_gradients(gradient[parts == parts.min()], logger=package.logger)

        return ApgdRows(
            self.module, labels, start, ball_of(images, self.eps, norm), package.apgd.n_iter, loss,
            told_gradient=check,
        )  # fmt: skip

    def _targets(self, images: Tensor, labels: Tensor, parts: Tensor) -> Tensor:
        """(R,) of the wrong classes, likeliest first, that of the part."""
        targets = likeliest_wrong(self.module(images), labels, self.parts)
        return targets.gather(1, parts[:, None])[:, 0]
