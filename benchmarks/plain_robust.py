"""PGD adversarial training of a ViT as it is usually written: timm, torchattacks, AdamW, a cosine, torch.compile.

The rival of `robust.py`, on its own: nothing of mimir_fast in here. What a careful user knows is done: the
optimiser is the fused one, images stay uint8 until their batch comes, and under torch.compile the weights are frozen
during the attack, so that its graph computes gradients to the images alone, as eager autograd does by itself.

Madry et al., arXiv 1706.06083; torchattacks: Kim, arXiv 2010.01950. Shapes: B images, C channels, H × W pixels.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


@dataclass(frozen=True)
class Recipe:
    """What both sides train.

    Attributes:
        image_size, channels, patch_size, width, depth, heads: of the ViT, for 10 classes.
        steps, warmup, batch_size, lr, weight_decay: of AdamW with a linear warm-up and a cosine to 0.
        eps, alpha, attack_steps: of PGD from a random start, for images in [0, 1].
    """

    image_size: int
    channels: int
    patch_size: int
    steps: int
    eps: float
    width: int = 96
    depth: int = 4
    heads: int = 3
    batch_size: int = 32
    lr: float = 1.5e-3
    weight_decay: float = 0.05
    attack_steps: int = 7

    @property
    def alpha(self) -> float:
        """A quarter of the radius."""
        return self.eps / 4

    @property
    def warmup(self) -> int:
        """A tenth of the steps."""
        return self.steps // 10


def build_model(recipe: Recipe) -> nn.Module:
    """timm's vision transformer, mean of the tokens, images in [0, 1]."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        recipe.image_size, recipe.patch_size, in_chans=recipe.channels, num_classes=10, embed_dim=recipe.width,
        depth=recipe.depth, num_heads=recipe.heads, global_pool="avg", fc_norm=True,
    )  # fmt: skip


def train(
    model: nn.Module, images: Tensor, labels: Tensor, recipe: Recipe, *, attack: str = "PGD", bf16: bool = False,
    compiled: bool = False, seed: int = 0,
) -> Iterator[int]:  # fmt: skip
    """Train in place; yields the number of steps done after each.

    Args:
        images, labels: (N, C, H, W) uint8, (N,) int64.
        attack: torchattacks' `PGD`, or `FFGSM`, FastAT's single step.
    """
    import torchattacks
    from timm.optim import param_groups_weight_decay

    torch.manual_seed(seed)  # of the attack's starts
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(
        TensorDataset(images, labels), recipe.batch_size, shuffle=True, drop_last=True, generator=order
    )  # fmt: skip
    groups = param_groups_weight_decay(
        model, recipe.weight_decay, no_weight_decay_list=("pos_embed", "cls_token")
    )  # fmt: skip
    optimizer = torch.optim.AdamW(groups, recipe.lr, betas=(0.9, 0.999), fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, recipe))
    network = torch.compile(model, dynamic=False) if compiled else model
    if attack == "PGD":
        adversary = torchattacks.PGD(network, recipe.eps, recipe.alpha, recipe.attack_steps)
    else:
        adversary = torchattacks.FFGSM(network, recipe.eps, 1.25 * recipe.eps)

    model.train()
    step = 0
    while step < recipe.steps:
        for x, y in loader:
            x = x.float() / 255
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                model.requires_grad_(not compiled)
                x = adversary(x, y)
                model.requires_grad_(True)
                loss = F.cross_entropy(network(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            step += 1
            yield step
            if step == recipe.steps:
                break


def schedule(step: int, recipe: Recipe) -> float:
    """Part of the peak learning rate."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    return 0.5 * (1 + math.cos(math.pi * (step - recipe.warmup) / (recipe.steps - recipe.warmup)))
