"""Several attempts one after the other, each on the images that the ones before did not break.

    several targets     one attempt for each of the likeliest wrong classes, and each random start
    several starts      one attempt for each random start

Multi-targeted attacks: Gowal et al., arXiv 1910.09338; targeted APGD: Croce & Hein, arXiv 2003.01690, §4, of which
AutoAttack takes nine targets and one start. With two classes there is one target, and it is the untargeted margin.

Where few images are left, or small ones, several attempts share a pass through the model (`passes.Attempts`).
Shapes: B images, R rows, each an image and an attempt, C channels, H × W pixels, K classes.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from mimir_fast.attacks.apgd import apgd, targeted_dlr
from mimir_fast.attacks.fab import FabRows
from mimir_fast.attacks.losses import Aimed, likeliest_wrong, targeted_margin
from mimir_fast.attacks.lp import Threat, attack_classifier
from mimir_fast.attacks.passes import Attempts, first_of_each
from mimir_fast.attacks.pgd import Loss, check_images, is_correct, samples_of
from mimir_fast.attacks.rows import searched
from mimir_fast.layers.borrowing import borrowed
from mimir_fast.validation import check_choice

Attempt = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(the model, positions of images (R,), numbers of attempts (R,)) → these images attacked (R, C, H, W)."""
AimedLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits (R, K), labels (R,), targets (R,)) → (R,)."""


SMALL_PASS = 2**15
"""Numbers of the images of a pass that several attempts share: with fewer, calls cost more than the work in them; with
many more, what a small model computes leaves the processor's cache. 512 digits of 8 × 8, ten images of 32 × 32."""


@torch.no_grad()
def first_to_fool(
    model: nn.Module, images: Tensor, labels: Tensor, attempt: Callable[[Tensor, Tensor], Tensor], tries: int, *,
    rows: int = 0,
) -> Tensor:  # fmt: skip
    """Each image (B, C, H, W) as the first attempt leaves it that makes it misclassified, else as the last one does.

    Args:
        attempt: (positions of images (R,), numbers of attempts (R,)) → these images attacked (R, C, H, W).
        tries: attempts are numbered from 0 to tries − 1.
        rows: of a call, at most, or as many as there are images; after the first call also as many as SMALL_PASS holds.
    """
    result, most = images.clone(), max(rows, len(images))
    attempts, stands = Attempts(len(images), tries), torch.ones(len(images), dtype=torch.bool, device=images.device)
    while len((taken := attempts.take(stands, most))[0]):
        at, numbers = taken
        x = attempt(at, numbers)
        wrong = (~is_correct(model(x), labels[at])).nonzero()[:, 0]
        # Rows are in the order of the attempts: the last one of each image, then the first one that fools.
        last = len(at) - 1 - first_of_each(at.flip(0))
        result[at[last]] = x[last]
        wrong = wrong[first_of_each(at[wrong])]
        result[at[wrong]] = x[wrong]
        stands[at[wrong]] = False
        most = max(most, SMALL_PASS // images[0].numel())
    return result


@torch.no_grad()
def until_broken(
    model: nn.Module, images: Tensor, labels: Tensor, attempt: Attempt, tries: int, *, rows: int = 0
) -> Tensor:
    """`first_to_fool` on the images (B, C, H, W) that are not misclassified as they are, the model in eval mode."""
    with borrowed(model, "eval") as module:
        result, right = images.clone(), is_correct(module(images), labels).nonzero()[:, 0]
        result[right] = first_to_fool(
            module, images[right], labels[right], lambda at, numbers: attempt(module, right[at], numbers), tries,
            rows=rows,
        )  # fmt: skip
        return result


def apgd_many(
    model: nn.Module, images: Tensor, labels: Tensor, eps: float, num_steps: int, *, loss: Loss | None = None,
    num_targets: int = 9, restarts: int = 1, norm: Literal["linf", "l2"] = "linf", samples: Tensor | None = None,
    seed: int = 0, rows: int = 0,
) -> Tensor:  # fmt: skip
    """APGD from several starts, untargeted with a loss, or, with None, at every one of several targets.

    Args:
        loss: (logits, labels) → (B,); None: the targeted DLR loss at each of the `num_targets` likeliest wrong classes,
            the targeted margin where there are fewer than four classes, which that loss compares.
        num_targets: at most K − 1 are there.
        restarts: random starts, of each target.
        samples, seed: coordinates of the random starts, see `pgd`.
        rows: see `first_to_fool`.
    """
    aims = _Aims(model, images, labels, num_targets, dlr=True) if loss is None else None
    known = samples_of(images, samples)

    def attempt(module: nn.Module, at: Tensor, numbers: Tensor) -> Tensor:
        return apgd(
            module, images[at], labels[at], eps, num_steps, loss=aims.of(at, numbers) if aims else loss or "ce",
            random_start=True, samples=known[at], seed=seed, step=numbers, keep="first", norm=norm, owners=at,
        )  # fmt: skip

    return until_broken(model, images, labels, attempt, restarts * (aims.count if aims else 1), rows=rows)


def pgd_many(
    model: nn.Module, images: Tensor, labels: Tensor, threat: Threat, *, loss: Loss | None = None, num_targets: int = 9,
    restarts: int = 1, samples: Tensor | None = None, seed: int = 0, rows: int = 0,
) -> Tensor:  # fmt: skip
    """PGD of any norm, else as `apgd_many`; its targeted loss is the targeted margin."""
    aims = _Aims(model, images, labels, num_targets, dlr=False) if loss is None else None
    known = samples_of(images, samples)

    def attempt(module: nn.Module, at: Tensor, numbers: Tensor) -> Tensor:
        chosen = aims.of(at, numbers) if aims else loss
        assert chosen is not None
        return attack_classifier(
            module, images[at], labels[at], threat, loss=chosen, samples=known[at], seed=seed, step=numbers, mode="eval"
        )

    return until_broken(model, images, labels, attempt, restarts * (aims.count if aims else 1), rows=rows)


def fab_many(
    model: nn.Module, images: Tensor, labels: Tensor, eps: float, num_steps: int, *, num_targets: int = 9,
    norm: Literal["linf", "l2"] = "linf", rows: int = 0,
) -> Tensor:  # fmt: skip
    """Targeted FAB from the images themselves at each of the likeliest wrong classes; see `apgd_many`.

    Raises:
        ValueError: these are no float images in [0, 1], or this is none of the two norms.
    """
    check_images(images, half=False)
    check_choice("norm", norm, ("linf", "l2"))
    aims = _Aims(model, images, labels, num_targets, dlr=False)

    def attempt(module: nn.Module, at: Tensor, numbers: Tensor) -> Tensor:
        targets = aims.targets[at, numbers]
        return searched(FabRows(module, images[at], labels[at], targets, eps, num_steps, norm), images[at], at)

    return until_broken(model, images, labels, attempt, aims.count, rows=rows)


class _Aims:
    """A targeted loss at each of the likeliest wrong classes."""

    @torch.no_grad()
    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, most: int, *, dlr: bool) -> None:
        with borrowed(model, "eval") as module:
            logits = module(images)
        self.targets = likeliest_wrong(logits, labels, most)  # (B, T)
        self.count = self.targets.shape[1]
        self.kind: AimedLoss = targeted_dlr if dlr and logits.shape[1] >= 4 else targeted_margin

    def of(self, at: Tensor, numbers: Tensor) -> Aimed:
        """That of rows: the attempts run through all targets, then through them again."""
        return Aimed(self.kind, self.targets[at, numbers % self.count])
