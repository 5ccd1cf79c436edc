"""A perceptual attack: images that layers of a network see as alike, however far apart their pixels are.

    φ(x)       the outputs of some layers; each place's vector over its length, each layer over √(its places), in a row
    d(x, x')   ‖φ(x) − φ(x')‖₂,   LPIPS with equal weights
    ascend     margin(f(x'), y) − λ·max(0, d(x, x') − bound),   λ rises tenfold as long as d is too large
    project    to the farthest point between x and x' where d ≤ bound, by bisection

The Lagrangian attack of Laidlaw, Singla & Feizi, arXiv 2006.12655, §4 and Algorithm 2, with the attacked model's own
features (their "self-bounded" attack): no other network is needed, and what is near to one model is not to another.
Not a perturbation within any ball of pixels.

Shapes: B images, C channels, H × W pixels, F numbers of all layers.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mimir_fast.attacks.losses import margin
from mimir_fast.attacks.pgd import check_images, is_correct, samples_of
from mimir_fast.layers.borrowing import borrowed
from mimir_fast.layers.outputs import layers_of, outputs_of
from mimir_fast.philox import Stream, normal

_STEP = 7 << 20  # of the random numbers: apart from those of other attacks
LAYERS = 5
"""As many as LPIPS takes of AlexNet, for which the paper's bounds are: the distance grows with them."""
FIRST_WEIGHT, START, PROBE, KAPPA, HALVINGS = 0.01, 0.01, 0.1, 1.0, 12
"""λ at first; deviation of the start; length by which d's slope is measured; a larger margin is no better; the last
gives the projection to 1/4096 of the way."""


def layers_with_places(model: nn.Module, images: Tensor, most: int = LAYERS) -> dict[str, nn.Module]:
    """Layers at equal distances, of those whose outputs have places: maps of pixels, or tokens. {}: it shows none."""
    layers = layers_of(model)
    with borrowed(model, "eval") as module, torch.no_grad(), outputs_of(layers) as seen:
        module(images)
    names = [name for name in layers if name in seen and _has_places(seen[name], len(images))]
    chosen = torch.linspace(0, len(names) - 1, min(most, len(names))).round().int().tolist()
    return {names[number]: layers[names[number]] for number in chosen}


def _has_places(output: Tensor, batch: int) -> bool:
    return output.ndim in (3, 4) and len(output) == batch and output.is_floating_point()


def features_of(outputs: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """(B, F) fp32: φ of the layers' outputs: maps (B, D, h, w) or (B, h, w, D), tokens (B, N, D)."""
    rows = []
    for output in outputs.values():
        axis = 2 if output.ndim == 3 else _channels(output, images)
        places = output[0].numel() // output.shape[axis]
        length = output.float().norm(dim=axis, keepdim=True) + 1e-10
        rows.append((output.float() / (length * places**0.5)).flatten(1))
    return torch.cat(rows, dim=1)


def _channels(output: Tensor, images: Tensor) -> int:
    """The axis of the channels of a map: the other two are shaped as the image is."""
    height, width = images.shape[-2:]
    first, second, third = output.shape[1:]
    return 3 if first * width == second * height and second * width != third * height else 1


def perceptual(
    model: nn.Module, images: Tensor, labels: Tensor, *, layers: Mapping[str, nn.Module], bound: float, num_steps: int,
    rounds: int = 5, samples: Tensor | None = None, seed: int = 0,
) -> Tensor:  # fmt: skip
    """Images (B, C, H, W) in [0, 1] whose features differ from the clean ones' by no more than `bound`.

    Args:
        layers: of the model, by name, called in each pass; `layers_with_places` finds them.
        bound: 0.5 in the paper; two images have a distance of at most 2·√(number of layers).
        num_steps: in each round, of a length that falls from `bound` to a tenth of it.
        rounds: of growing λ.
        samples, seed: coordinates of the random start, see `pgd`.
    Raises:
        ValueError: there are no layers.
    """
    check_images(images, half=False)
    if not layers:
        raise ValueError("perceptual needs layers of the model, whose outputs are maps or tokens")
    samples = samples_of(images, samples)
    noise = normal(seed, Stream.ATTACK_START, _STEP, samples, images[0].numel() if len(images) else 1)
    images, column = images.detach(), (-1, 1, 1, 1)
    x = (images + START * noise.view_as(images)).clamp(0, 1)
    weight = torch.full((len(images),), FIRST_WEIGHT, device=images.device)
    with borrowed(model, "eval") as module, outputs_of(layers) as seen, torch.no_grad():

        def look(at: Tensor) -> tuple[Tensor, Tensor]:
            logits = module(at)
            return logits.float(), features_of(seen, at)

        clean = look(images)[1]
        live = torch.arange(len(images), device=images.device)
        for _ in range(rounds):
            for step in range(num_steps):
                if len(live) == 0:
                    break
                at = x[live].requires_grad_()
                with torch.enable_grad():
                    logits, now = look(at)
                    distance = (now - clean[live]).norm(dim=1)
                    gain = margin(logits, labels[live]).clamp(max=KAPPA) - weight[live] * (distance - bound).relu()
                    (grad,) = torch.autograd.grad(gain.sum(), at)
                grad, now, at = grad.nan_to_num(0, 0, 0), now.detach(), at.detach()
                direction = grad / (grad.flatten(1).norm(dim=1).view(column) + 1e-8)
                slope = (look(at + PROBE * direction)[1] - now).norm(dim=1) / PROBE
                length = bound * 0.1 ** (step / num_steps) / (slope + 1e-8)
                moved = (at + length.view(column) * direction).clamp(0, 1)
                far = distance > bound
                stays = is_correct(logits, labels[live]) | far
                x[live[stays]] = moved[stays].nan_to_num(0)
                if step == num_steps - 1:
                    weight[live[far]] *= 10
                live = live[stays]
        inside, outside = torch.zeros_like(weight), torch.ones_like(weight)
        share = outside  # of the way from the clean image to x
        for _ in range(HALVINGS):
            near = (look(images + share.view(column) * (x - images))[1] - clean).norm(dim=1) <= bound
            inside, outside = torch.where(near, share, inside), torch.where(near, outside, share)
            share = torch.where(inside == 1, inside, (inside + outside) / 2)
        return images + inside.view(column) * (x - images)
