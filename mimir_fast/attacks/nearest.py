"""APGD that gives its random starts to the images that are nearest to be misclassified.

A few images of a set fall to one start in twenty, most of those that stand to none. So in each round the half of the
images to which the attack came closer goes on, from twice as many starts: every round costs the same, and after R
rounds the nearest have had up to 2ᴿ − 1 starts, everyone one. This is successive halving (Jamieson & Talwalkar,
arXiv 1502.07943) with the margin as what an image is judged by.

Shapes: B images, R rows, each an image and a start, C channels, H × W pixels, K classes.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from mimir_fast.attacks.apgd import apgd
from mimir_fast.attacks.losses import margin
from mimir_fast.attacks.pgd import Loss, is_correct, samples_of
from mimir_fast.layers.borrowing import borrowed


@torch.no_grad()
def apgd_nearest(
    model: nn.Module, images: Tensor, labels: Tensor, eps: float, num_steps: int, *, losses: Sequence[Loss],
    rounds: int = 5, norm: Literal["linf", "l2"] = "linf", samples: Tensor | None = None, seed: int = 0, rows: int = 0,
) -> Tensor:  # fmt: skip
    """Adversarial images (B, C, H, W) within eps; an image is left as soon as it is misclassified.

    Which images go on depends on who else is in the batch.

    Args:
        labels: (B,) int64.
        losses: (logits, labels) → (rows,); the starts of an image take them in turn.
        rounds: R.
        samples, seed: coordinates of the random starts, see `pgd`.
        rows: of a pass, at least; never fewer than there are images.
    """
    known = samples_of(images, samples)
    most = max(rows, len(images))
    with borrowed(model, "eval") as module:
        result, height = images.clone(), _height(module(images), labels)

        def attack(at: Tensor, starts: Tensor, loss: Loss) -> None:
            """Attack images from several starts each, and keep the highest point."""
            at_R, step_R = at.repeat_interleave(len(starts)), starts.repeat(len(at))
            x = apgd(
                module, images[at_R], labels[at_R], eps, num_steps, loss=loss, random_start=True, samples=known[at_R],
                seed=seed, step=step_R, keep="first", norm=norm, owners=at_R,
            )  # fmt: skip
            highest, best = _height(module(x), labels[at_R]).view(-1, len(starts)).max(dim=1)
            x = x.view(-1, len(starts), *images.shape[1:])[torch.arange(len(at), device=x.device), best]
            higher = highest > height[at]
            result[at[higher]], height[at] = x[higher], highest.maximum(height[at])

        left, done, count = height.isfinite().nonzero()[:, 0], 0, 1
        for _ in range(rounds):
            starts = torch.arange(done, done + count, device=images.device)
            for kind, loss in enumerate(losses):
                if len(own := starts[starts % len(losses) == kind]):
                    for at in left.split(max(1, most // len(own))):
                        attack(at, own, loss)
                left = left[height[left].isfinite()]
            done += count
            if len(left) > 1:
                left = left[height[left].argsort(descending=True, stable=True)[: -(-len(left) // 2)]]
                count *= 2
        return result


def _height(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,) the margin, infinite where the image is misclassified: how near an attack came."""
    return margin(logits, labels).masked_fill(~is_correct(logits, labels), torch.inf)
