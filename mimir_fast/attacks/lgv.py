"""LGV: models around another one, for images that are made on them to fool one that nobody has seen.

    θ ← SGD(θ) at a constant high learning rate, from a trained model's weights, on training data; some θ are kept
    an attack's steps go through these models, one after the other

What fools weights that lie far apart around one minimum fools other models more often than what fools the minimum
alone. Gubri et al., arXiv 2207.13129, §3; SGD's momentum and weight decay are theirs.

Shapes: B images, C channels, H × W pixels, K classes.
"""

import copy
from collections.abc import Iterable
from itertools import islice

import torch
from torch import Tensor, nn

from mimir_fast.attacks.pgd import cross_entropy
from mimir_fast.layers.borrowing import unwrap

MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4


def collect(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, count: int, every: int, lr: float = 0.05,
    seed: int = 0,
) -> list[nn.Module]:  # fmt: skip
    """Copies of a model as SGD passes them, in eval mode; the model is left untouched.

    Args:
        model: takes images in [0, 1], returns logits (B, K). It is trained in train mode: batch norms follow along.
        batches: (images (B, C, H, W), labels (B,) int64) on the model's device, shuffled; `count` · `every` of them.
        count: how many copies.
        every: SGD steps from one to the next.
        lr: constant; the paper found 0.05 best for a ResNet-50 at 256 images a batch.
        seed: of dropout.
    Raises:
        ValueError: the model has no weights to train, or they are no longer finite.
    """
    walker = copy.deepcopy(unwrap(model)).train()
    weights = [p for p in walker.parameters() if p.requires_grad] or list(walker.parameters())
    if not weights:
        raise ValueError("it has no weights to train, and LGV collects models by training")
    for weight in weights:
        weight.requires_grad_()
    optimizer = torch.optim.SGD(weights, lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    models, stream = list[nn.Module](), iter(batches)
    devices = sorted({p.device.index for p in weights if p.device.type == "cuda"})
    with torch.random.fork_rng(devices), torch.enable_grad():
        torch.manual_seed(seed)
        for _ in range(count):
            for images, labels in islice(stream, every):
                optimizer.zero_grad()
                cross_entropy(walker(images), labels).mean().backward()
                optimizer.step()
            if not all(weight.isfinite().all() for weight in weights):
                raise ValueError(f"its weights are not finite after SGD at the learning rate {lr:g}: take a lower one")
            optimizer.zero_grad()
            models.append(copy.deepcopy(walker).eval())
    return models


def visits(count: int, seed: int = 0) -> list[int]:
    """The order in which an attack goes through so many models, again and again."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
