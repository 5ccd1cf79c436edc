"""Auto-PGD: PGD with momentum and step sizes that halve by themselves; for evaluation and, short, for training.

    z  = Π( x_t + η·sign ∇L(x_t) )
    x_{t+1} = Π( x_t + a·(z − x_t) + (1 − a)·(x_t − x_{t−1}) ),   a = 0.75 (1 in the first step),  η₀ = 2ε

For an L2 ball, sign ∇L is ∇L / ‖∇L‖₂. At checkpoints an image's η is halved, and the search goes on from its best
point, if the loss rose in fewer than ρ = 75 % of the steps since the last checkpoint, or if neither η nor the best loss
changed.
Croce & Hein, arXiv 2003.01690, Algorithm 1 and §3; losses Eq. 6 (DLR) and §4 (targeted DLR). APGD-k training (Singh et
al., arXiv 2303.01870): no random start, the model in eval mode, the point of highest loss.

Shapes: B images, C channels, H × W pixels, K classes.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from mimir_fast.attacks.apgd_rows import ApgdRows, Ball, L2Ball, LinfBall
from mimir_fast.attacks.losses import Aimed, likeliest_wrong
from mimir_fast.attacks.lp import random_in_ball
from mimir_fast.attacks.pgd import Loss, check_images, cross_entropy, image_bounds, samples_of
from mimir_fast.attacks.rows import run_rows
from mimir_fast.attacks.threat_model import LinfThreat
from mimir_fast.layers.borrowing import AttackMode, borrowed
from mimir_fast.ops.random_uniform import random_uniform
from mimir_fast.philox import Stream

ApgdLoss = Literal["ce", "dlr", "targeted-dlr"]
Keep = Literal["best_loss", "adversarial", "first"]


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,) difference of logits ratio, −(z_y − max_{i≠y} z_i) / (z_π1 − z_π3); invariant to scale and shift.

    Raises:
        ValueError: fewer than 3 classes.
    """
    _need_classes(logits, 3, "dlr")
    values, order = logits.float().sort(dim=1)
    true = logits.float().gather(1, labels[:, None])[:, 0]
    other = torch.where(order[:, -1] == labels, values[:, -2], values[:, -1])
    return -(true - other) / (values[:, -1] - values[:, -3] + 1e-12)


def targeted_dlr(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """(B,) −(z_y − z_t) / (z_π1 − (z_π3 + z_π4)/2), maximal where class t wins over the true class.

    Raises:
        ValueError: fewer than 4 classes.
    """
    _need_classes(logits, 4, "targeted-dlr")
    values = logits.float().sort(dim=1).values
    margin = (logits.gather(1, labels[:, None]) - logits.gather(1, targets[:, None]))[:, 0].float()
    return -margin / (values[:, -1] - 0.5 * (values[:, -3] + values[:, -4]) + 1e-12)


def _need_classes(logits: Tensor, wanted: int, loss: str) -> None:
    if logits.shape[-1] < wanted:
        raise ValueError(
            f"the {loss} loss compares the {wanted} largest logits, but the model has {logits.shape[-1]} classes; "
            "use loss='ce'"
        )


def apgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    num_steps: int,
    *,
    loss: ApgdLoss | Loss = "ce",
    targets: Tensor | None = None,
    random_start: bool = False,
    samples: Tensor | None = None,
    seed: int = 0,
    step: int | Tensor = 0,
    keep: Keep = "best_loss",
    mode: AttackMode = "eval",
    norm: Literal["linf", "l2"] = "linf",
    owners: Tensor | None = None,
) -> Tensor:
    """Adversarial images (B, C, H, W), within eps of the images and in [0, 1] to the last bit.

    Args:
        model: takes images in [0, 1], returns logits (B, K); it is left untouched.
        labels: (B,) int64; soft labels (B, K) with loss `ce`.
        eps: radius in units of [0, 1].
        num_steps: gradient steps; 100 in AutoAttack, 2 or so in training.
        loss: `ce`, `dlr`, `targeted-dlr`, or any (logits, labels) → (B,).
        targets: (B,) int64 classes for `targeted-dlr`; None takes the likeliest wrong class of the clean image.
        random_start: start at a random point that touches the ball's surface, as AutoAttack does.
        samples, seed, step: coordinates of the random start, see `pgd`.
        keep: the point of highest loss (training), or the last misclassified one where there was any (evaluation), or
            the first one: an image that has it is no longer attacked, which is the fastest way to break many.
        owners: (B,) int64, with keep `first`: which rows are of one image. When one of them is misclassified, it is the
            result of all of them; None: each is an image of its own.
        norm: of the ball; L1 needs an algorithm of its own (Croce & Hein, arXiv 2103.01208), which pyautoattack has.
    Raises:
        ValueError: bad eps, steps or images, too few classes for the loss, soft labels where `keep` is not `best_loss`.
    """
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm={norm!r}, wanted 'linf' or 'l2'; for L1 use AutoAttack's own APGD (pyautoattack)")
    # Says what is wrong with a bad eps or num_steps; an L2 ball may be larger than 1.
    LinfThreat(eps=eps if norm == "linf" else min(eps, 1.0), alpha=0.0, num_steps=num_steps)
    check_images(images, values=images.device.type == "cpu")
    if keep != "best_loss" and labels.ndim != 1:
        raise ValueError(f"keep={keep!r} needs hard labels (B,), got labels of shape {tuple(labels.shape)}")
    images = images.detach()
    start = surface_start(images, eps, norm, samples=samples, seed=seed, step=step) if random_start else images
    with borrowed(model, mode) as module:
        loss_of = _loss_function(loss, module, images, labels, targets)
        if num_steps == 0 or len(images) == 0:
            return start
        return _search(ApgdRows(module, labels, start, ball_of(images, eps, norm), num_steps, loss_of), keep, owners)


def ball_of(images: Tensor, eps: float, norm: Literal["linf", "l2"]) -> Ball:
    """The ball of radius eps around the images."""
    return LinfBall(images, eps) if norm == "linf" else L2Ball(images, eps)


def surface_start(
    images: Tensor, eps: float, norm: Literal["linf", "l2"], *, samples: Tensor | None, seed: int, step: int | Tensor
) -> Tensor:  # fmt: skip
    """Random points (B, C, H, W) that touch the ball's surface, cut to [0, 1]; L∞: the largest element of uniform noise
    is scaled to eps. `step` may be one a sample, (B,)."""
    if norm == "l2":
        return random_in_ball(images, eps, "l2", samples=samples, seed=seed, step=step, surface=True)
    num = images[0].numel() if len(images) else 1
    noise = 2 * random_uniform(seed, Stream.ATTACK_START, step, samples_of(images, samples), num) - 1
    noise = eps * noise / (noise.abs().amax(dim=1, keepdim=True) + 1e-12)
    low, high = image_bounds(images, eps)
    return (images + noise.view_as(images).to(images.dtype)).clamp(low, high)


def _loss_function(
    loss: ApgdLoss | Loss, module: nn.Module, images: Tensor, labels: Tensor, targets: Tensor | None
) -> Loss:
    if callable(loss):
        return loss
    if loss == "ce":
        return cross_entropy
    if loss == "dlr":
        return dlr
    if loss == "targeted-dlr":
        if targets is None:
            with torch.no_grad():
                targets = likeliest_wrong(module(images), labels, 1)[:, 0]
        return Aimed(targeted_dlr, targets)
    raise ValueError(f"loss={loss!r}, wanted 'ce', 'dlr', 'targeted-dlr' or a function (logits, labels) -> (B,)")


def _search(search: ApgdRows, keep: Keep, owners: Tensor | None) -> Tensor:
    """The point of each image that is kept after all steps; see `apgd`."""
    if keep == "first":
        device = search.x.device
        owners = torch.arange(len(search.x), device=device) if owners is None else owners
        result, place = torch.empty_like(search.x), torch.full((int(owners.max()) + 1,), -1, device=device)
        broken, where = run_rows(search, owners)
        place[broken] = torch.arange(len(broken), device=device)
        rows = place[owners]
        if len(broken):
            result[rows >= 0] = where[rows[rows >= 0]]
        result[rows < 0] = search.best
        return result
    fooled, found = search.x, torch.zeros(len(search.x), dtype=torch.bool, device=search.x.device)
    while not search.finished():
        wrong, x = search.step()
        if keep == "adversarial":
            fooled, found = torch.where(wrong.view(-1, 1, 1, 1), x, fooled), found | wrong
    if keep == "adversarial":
        return torch.where(found.view(-1, 1, 1, 1), fooled, search.best)
    return search.best
