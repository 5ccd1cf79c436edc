"""Adaptive attacks: on what MIMIR bounds (PGD-MI), on features (PGD-fea), and on the reconstruction.

    PGD-MI    maximise  mean CE(f(x+δ), y) + λ·I(x+δ, z),    z the features of x+δ
    PGD-fea   maximise  ‖g(x+δ) − g(x)‖₂,                    g the features; labels are not used
    reconstruction      maximise the masked autoencoder's error on the masked patches, by perturbing the visible ones

MIMIR, arXiv 2312.04960, §5 (adaptive attacks). Features are what `model.forward_features(images)` returns (timm's
convention). Shapes: B images, C channels, H × W pixels, N patches, K kept, M masked, P numbers a patch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mimir_fast.attacks.lp import Threat, ascent, start_of
from mimir_fast.attacks.pgd import check_images, cross_entropy, random_start
from mimir_fast.attacks.reconstruction import attack_visible
from mimir_fast.attacks.threat_model import LinfThreat
from mimir_fast.layers.borrowing import AttackMode, borrowed, unwrap
from mimir_fast.models.masked_model import MaskedModel, View
from mimir_fast.ops.masked_loss import Kind
from mimir_fast.ops.nhsic import nhsic
from mimir_fast.ops.patches import gather_patches, masked_targets, patchify
from mimir_fast.ops.random_masks import random_masks

MutualInformation = Callable[[Tensor, Tensor], Tensor]
"""(images (B, …), features (B, …)) → scalar."""


def has_features(model: nn.Module) -> bool:
    """True when the model offers `forward_features`."""
    return callable(getattr(unwrap(model), "forward_features", None))


def _features(module: nn.Module, images: Tensor) -> Tensor:
    if not has_features(module):
        raise ValueError(
            f"{type(module).__name__} has no forward_features(images), which this attack maximises over; give it that "
            "method (timm's convention), or leave the feature attacks out"
        )
    forward_features: Callable[[Tensor], Tensor] = module.forward_features  # type: ignore[assignment]
    return forward_features(images).flatten(1).float()


def pgd_mi(
    model: nn.Module, images: Tensor, labels: Tensor, threat: Threat, *, weight: float | Literal["balanced"] = 1e-5,
    estimator: MutualInformation = nhsic, samples: Tensor | None = None, seed: int = 0, step: int = 0,
    mode: AttackMode = "eval",
) -> Tensor:  # fmt: skip
    """Adversarial images (B, C, H, W) against cross entropy and the mutual information that MIMIR keeps low.

    The estimate is one number a batch, so the attack on an image depends on its batch mates; an image that is alone in
    its batch shares no information with anything, and is attacked by cross entropy. Other arguments as for `pgd`.

    Args:
        weight: λ, as in pre-training, beside the mean cross entropy of the batch; `balanced` chooses it so that both
            gradients to the images have one norm where the attack starts. At 1e-5 HSIC's gradient is lost in rounding.
        estimator: of I(x+δ, z), such as `nhsic` (the authors', σ = 5), `hsic` or `renyi_mi`.
    """
    check_images(images)
    images = images.detach()
    start = start_of(images, threat, samples=samples, seed=seed, step=step)
    with borrowed(model, mode) as module:
        head = getattr(module, "forward_head", None)

        def both(x: Tensor) -> tuple[Tensor, Tensor]:
            if callable(head):  # one pass gives features and logits
                features = module.forward_features(x)  # type: ignore[operator]
                logits, latent = head(features), features.flatten(1).float()
            else:
                logits, latent = module(x), _features(module, x)
            return cross_entropy(logits, labels), estimator(x, latent)

        if len(images) < 2:
            return ascent(lambda x: cross_entropy(module(x), labels), images, start, threat)
        # The ascent sums the cross entropy over images, so B·λ there is λ beside the mean.
        factor = _balance(both, start) if weight == "balanced" else len(images) * float(weight)

        def objective(x: Tensor) -> Tensor:
            loss, information = both(x)
            return loss + factor * information / len(x)

        return ascent(objective, images, start, threat)


def _balance(both: Callable[[Tensor], tuple[Tensor, Tensor]], start: Tensor) -> float:
    """λ at which the gradients of Σ CE and of λ·I have one norm; 0 where I has none."""
    x = start.detach().requires_grad_()
    with torch.enable_grad():
        loss, information = both(x)
        (of_loss,) = torch.autograd.grad(loss.sum(), x, retain_graph=True)
        (of_information,) = torch.autograd.grad(information, x)
    norm = float(of_information.double().norm())
    return float(of_loss.double().norm()) / norm if norm > 0 else 0.0


def pgd_features(
    model: nn.Module, images: Tensor, threat: Threat, *, samples: Tensor | None = None, seed: int = 0,
    step: int = 0, mode: AttackMode = "eval",
) -> Tensor:  # fmt: skip
    """Adversarial images (B, C, H, W) whose features are far from the clean ones.

    Raises:
        ValueError: no random start: at δ = 0 the distance has no gradient and the attack would not move.
    """
    check_images(images)
    if not threat.random_start:
        raise ValueError("pgd_features needs random_start=True: at the clean image the distance has no gradient")
    images = images.detach()
    start = start_of(images, threat, samples=samples, seed=seed, step=step)
    with borrowed(model, mode) as module:
        with torch.no_grad():
            clean = _features(module, images)
        return ascent(lambda x: torch.linalg.vector_norm(_features(module, x) - clean, dim=1), images, start, threat)


@dataclass
class ReconstructionErrors:
    """Mean error on the masked patches, (B,) fp32 each: of clean, randomly perturbed and attacked images."""

    clean: Tensor
    random: Tensor
    attacked: Tensor


def attack_reconstruction(
    model: MaskedModel, images: Tensor, threat: LinfThreat, *, mask_ratio: float = 0.75, norm_pix: bool = True,
    kind: Kind = "l2", mask: tuple[Tensor, Tensor] | None = None, samples: Tensor | None = None, seed: int = 0,
    step: int = 0,
) -> ReconstructionErrors:  # fmt: skip
    """How much worse a masked autoencoder fills in clean masked patches when the visible ones are attacked.

    Args:
        images: (B, C, H, W) float in [0, 1].
        threat: of the perturbation; random noise of the same radius is the yardstick.
        mask_ratio: part of the patches that is masked, each for itself.
        norm_pix: compare patches normalised one by one, as in pre-training.
        kind: squared (`l2`) or absolute (`l1`) errors, as in pre-training; attacked and reported alike.
        mask: (B, K) kept and (B, M) masked patches, in place of `mask_ratio`.
    """
    check_images(images)
    bare = unwrap(model)
    if not isinstance(bare, MaskedModel):
        raise ValueError(f"attack_reconstruction wants a MaskedModel, got {type(bare).__name__}")
    if samples is None:
        samples = torch.arange(len(images), device=images.device)
    if mask is None:
        num_keep = max(1, int(bare.num_patches * (1 - mask_ratio)))
        mask = random_masks(samples, bare.num_patches, num_keep, seed=seed, step=step)
    keep, masked = mask
    target = masked_targets(images, masked, bare.patch_size, norm_pix=norm_pix)

    def visible_of(pixels: Tensor) -> Tensor:
        return gather_patches(patchify(pixels, bare.patch_size), keep)

    clean = visible_of(images)
    noise = visible_of(random_start(images, threat.eps, samples=samples, seed=seed, step=step))
    with borrowed(model, "eval") as module:
        start = noise if threat.random_start else clean
        attacked = attack_visible(module, images, clean, start, keep, masked, norm_pix, threat, kind)

        @torch.no_grad()
        def error(patches: Tensor) -> Tensor:
            prediction = module(View(patches, keep, masked)).prediction
            difference = prediction.float() - target
            return (difference.square() if kind == "l2" else difference.abs()).mean(dim=(1, 2))

        return ReconstructionErrors(error(clean), error(noise), error(attacked))
