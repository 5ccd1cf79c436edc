"""A MIMIR step written plainly, the way masked-autoencoder code is usually written: the rival of `benchmarks.step`.

The same numbers as ours from the same weights and draws, by the long way: all patches are embedded and three quarters
thrown away, gathers have materialised indices, the attack moves whole images through a chain of element-wise ops, the
decoder predicts every patch and a mask selects the loss, the Gram matrices go to the host.
Source: He et al., arXiv 2111.06377, and MIMIR, arXiv 2312.04960, Algorithm 1; written from the papers.

Shapes: B images, N patches, K kept, P numbers a patch, D encoder width, E decoder width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.hsic import authors as hsic_on_host
from benchmarks.patches import repeat_gather
from mimir_fast.methods.mimir import MimirConfig
from mimir_fast.methods.step import MaskedStep
from mimir_fast.models.masked_model import MaskedModel
from mimir_fast.ops.patches import patchify, unpatchify
from mimir_fast.ops.random_uniform import random_uniform
from mimir_fast.philox import Stream


def forward(model: MaskedModel, images: Tensor, ids_keep: Tensor, restore: Tensor) -> tuple[Tensor, Tensor]:
    """(latent (B, 1 + K, D), prediction (B, N, P)) from whole images."""
    encoder: Any = model.encoder
    decoder: Any = model.decoder
    projection = encoder.patch_embed.proj
    tokens = F.conv2d(images, projection.weight, projection.bias, projection.stride).flatten(2).transpose(1, 2)
    x = repeat_gather(tokens + encoder.pos_embed[:, 1:], ids_keep)
    cls = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(len(x), -1, -1)
    x = torch.cat([cls.to(x.dtype), x], dim=1)
    for block in encoder.blocks:
        x = block(x)
    latent = encoder.norm(x)

    x = decoder.decoder_embed(latent)
    missing = decoder.mask_token.to(x.dtype).repeat(len(x), restore.shape[1] + 1 - x.shape[1], 1)
    full = repeat_gather(torch.cat([x[:, 1:], missing], dim=1), restore)
    x = torch.cat([x[:, :1], full], dim=1) + decoder.decoder_pos_embed
    for block in decoder.decoder_blocks:
        x = block(x)
    return latent, decoder.decoder_pred(decoder.decoder_norm(x))[:, 1:]


def losses(step: MaskedStep, config: MimirConfig) -> dict[str, Tensor]:
    """{"loss": MSE on the masked patches + λ·HSIC}, by the paper's preset, from the step's mask and noise."""
    model, images, attack = step.bare, step.batch.images, config.attack
    (keep, masked), p = step.draw_mask(config, Stream.MASK), model.patch_size
    restore = torch.cat([keep, masked], dim=1).argsort(dim=1)
    clean = images.float() / 255 if images.dtype == torch.uint8 else images
    target = patchify(clean, p)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    mask = torch.ones(target.shape[:2], device=clean.device).scatter(1, keep, 0)

    def reconstruction(x: Tensor) -> tuple[Tensor, Tensor]:
        latent, prediction = forward(model, x, keep, restore)
        return latent, ((prediction.float() - target).square().mean(-1) * mask).sum() / mask.sum()

    count = keep.shape[1] * target.shape[2]
    draws = random_uniform(step.seed, Stream.ATTACK_START, step.number, step.batch.samples, count)
    delta = (2 * draws - 1).mul_(attack.eps).view(len(keep), -1, target.shape[2]).to(target.dtype)
    noise = torch.zeros_like(target).scatter(1, keep.unsqueeze(-1).expand_as(delta), delta)
    x_adv = (clean + unpatchify(noise, p)).clamp(0, 1)
    for _ in range(attack.num_steps):
        x_adv = x_adv.detach().requires_grad_()
        (grad,) = torch.autograd.grad(reconstruction(x_adv)[1], x_adv)
        delta = torch.clamp(x_adv + attack.alpha * grad.sign() - clean, -attack.eps, attack.eps)
        x_adv = torch.clamp(clean + delta, 0, 1).detach()
    latent, loss = reconstruction(x_adv)
    with torch.autocast(clean.device.type, enabled=False):
        penalty = hsic_on_host(x_adv.float().flatten(1), latent.float().flatten(1)).to(loss.device)
    return {"loss": loss + config.mi.weight * penalty}
