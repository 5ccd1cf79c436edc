"""Projected gradient descent (PGD) on a classifier, with FGSM and the FastAT step as its one-step members.

    x ← Π( x + α·sign ∇ₓ Σᵢ loss(f(x)ᵢ, yᵢ) ),   Π: onto the L∞ ball of radius ε around the clean image, and to [0, 1]

Madry et al., arXiv 1706.06083 (PGD); Goodfellow et al., arXiv 1412.6572 (FGSM); Wong et al., arXiv 2001.03994 (FastAT).
The loss is summed: only the sign of its gradient is used, and a mean over a large batch underflows in half precision.
Starts are functions of (seed, step, sample), so an image is attacked the same way in any batch and on any rank.

Shapes: B images, C channels, H × W pixels, K classes.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimir_fast.attacks.ascent import BeforeStep, Objective, ascend
from mimir_fast.attacks.threat_model import SINGLE_STEP, LinfThreat
from mimir_fast.layers.borrowing import AttackMode, borrowed
from mimir_fast.ops._checks import check_tensors
from mimir_fast.ops.ball import ball_bounds
from mimir_fast.ops.random_uniform import random_start_linf
from mimir_fast.validation import number_of

Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits (B, K), labels) → (B,) losses, to be maximised."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,) cross entropy in fp32; labels (B,) int64, or (B, K) probabilities."""
    return F.cross_entropy(logits.float(), labels, reduction="none")


NO_CLASS = -1
"""Stands for a class where the logits are not finite."""


def predicted(logits: Tensor) -> Tensor:
    """(…) int64: the class of the largest of (…, K) logits; NO_CLASS where one is NaN or infinite.

    The argmax of such an answer means nothing: that of NaN is class 0, some images' label.
    """
    return logits.argmax(dim=-1).masked_fill(~logits.isfinite().all(dim=-1), NO_CLASS)


def is_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,) bool: the largest logit is the label's (B,). An answer that is not finite is wrong."""
    return predicted(logits) == labels


def image_bounds(images: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The smallest and largest representable images within eps of `images` and in [0, 1], exactly."""
    low, high = ball_bounds(images, eps, exact=torch.float64)
    return low.clamp(0, 1), high.clamp(0, 1)


def check_images(images: Tensor, *, values: bool = True, gradients: bool = True, half: bool = True) -> None:
    """Refuse what an attack cannot begin with.

    Args:
        values: look at every number.
        gradients: the attack takes some.
        half: it computes in floats of 16 bits too.
    Raises:
        ValueError: `images` is no float (B, C, H, W) tensor, finite and (where `values`) within [0, 1], or too short.
        RuntimeError: in `torch.inference_mode()`, where (`gradients`) there are none.
    """
    check_tensors(images=images)
    if gradients and torch.is_inference_mode_enabled():
        raise RuntimeError(
            "an attack takes gradients, and torch.inference_mode() allows none inside: call it outside, or under "
            "torch.no_grad()"
        )
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(
            f"an attack wants float images (B, C, H, W) in [0, 1], got {images.dtype} {tuple(images.shape)}; "
            "for uint8 images pass images.float() / 255"
        )
    if images.dtype.itemsize < 4 and not half:
        raise ValueError(
            f"this attack computes in float32 or finer, got {images.dtype} images: give it images.float(), and the "
            "model as it is, under torch.autocast"
        )
    if values and images.numel():
        low, high = (float(v) for v in images.aminmax())
        if not 0 <= low <= high <= 1:  # also false for NaN
            raise ValueError(
                f"images span [{low:g}, {high:g}], but ε is measured on images in [0, 1]: do not normalise before the "
                "attack, put the normalisation into the model (mimir_fast.evaluation.adapters.Normalized)"
            )


def samples_of(images: Tensor, samples: Tensor | None) -> Tensor:
    """(B,) int64 on the images' device: global indices of the images, 0 … B−1 where none are given."""
    return torch.arange(len(images), device=images.device) if samples is None else samples.to(images.device)


def random_start(
    images: Tensor, eps: float, *, samples: Tensor | None = None, seed: int = 0, step: int | Tensor = 0
) -> Tensor:
    """Images (B, C, H, W) uniform in the ball of radius eps, cut to [0, 1].

    Args:
        samples: (B,) int64 global indices of the images; None stands for 0 … B−1.
        step: another one is another start; (B,) int64 gives each image its own.
    """
    return random_start_linf(images, samples_of(images, samples), seed=seed, step=step, eps=eps)


def linf_ascent(
    objective: Objective,
    images: Tensor,
    start: Tensor,
    threat: LinfThreat,
    *,
    before_step: BeforeStep | None = None,
) -> Tensor:
    """`ascend` on images (B, C, H, W): the result is within eps of `images` and in [0, 1] to the last bit."""
    low, high = image_bounds(images, threat.eps)
    return ascend(objective, images, start, threat, before_step=before_step).clamp(low, high)


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat: LinfThreat,
    *,
    loss: Loss = cross_entropy,
    samples: Tensor | None = None,
    seed: int = 0,
    step: int = 0,
    start: Tensor | None = None,
    mode: AttackMode = "as_is",
) -> Tensor:
    """Adversarial images (B, C, H, W) for a classifier.

    Args:
        model: takes images in [0, 1] (normalisation inside), returns logits (B, K); it is left untouched.
        images: (B, C, H, W) float in [0, 1].
        labels: whatever `loss` takes; (B,) int64 for the default.
        threat: eps, alpha, num_steps, random_start.
        loss: (logits, labels) → (B,), maximised.
        samples: (B,) int64 global indices, to which the random start belongs; None stands for 0 … B−1.
        seed, step: the random start's other coordinates; give a restart its own step.
        start: (B, C, H, W) where to start; overrules the random start.
        mode: run the model in `eval` or `train` mode, or `as_is`.
    Raises:
        ValueError: images are not float (B, C, H, W), or not in [0, 1] (not looked at on a GPU unless mode is `eval`:
            the answer would make the training step wait).
    """
    check_images(images, values=mode == "eval" or images.device.type == "cpu")
    images = images.detach()
    if start is None:
        start = images
        if threat.random_start:
            start = random_start(images, threat.eps, samples=samples, seed=seed, step=step)
    with borrowed(model, mode) as module:
        return linf_ascent(lambda x: loss(module(x), labels), images, start, threat)


class PGD:
    """`pgd` as an object: `PGD(model)(images, labels)`, as torchattacks has it, and with its names and defaults.

    The model is attacked in eval mode and left as it was. Each call has another random start, a function of (seed,
    number of the call, place in the batch).

    Args:
        model: takes images in [0, 1] (normalisation inside), returns logits (B, K).
        eps: radius of the L∞ ball, 8/255, not 8; kept exactly, where torchattacks' images may leave it by a rounding.
        alpha: step size; both may be the text of a fraction, "8/255".
        steps: how many.
        random_start: start uniformly in the ball, otherwise at the clean image.
        seed: of the random starts.
    Raises:
        ValueError: eps or alpha outside of [0, 1], steps < 0; when called, as `pgd`.

    Example:
        >>> attack = PGD(model, eps=8 / 255, alpha=2 / 255, steps=10)
        >>> adversarial = attack(images, labels)
    """

    def __init__(
        self,
        model: nn.Module,
        eps: float | str = 8 / 255,
        alpha: float | str = 2 / 255,
        steps: int = 10,
        random_start: bool = True,
        *,
        seed: int = 0,
    ):
        self.model, self.seed, self.calls = model, seed, 0
        eps, alpha = number_of("eps", eps), number_of("alpha", alpha)
        self.threat = LinfThreat(eps=eps, alpha=alpha, num_steps=steps, random_start=random_start)

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Adversarial images (B, C, H, W) for (B,) int64 labels, detached."""
        self.calls += 1
        return pgd(self.model, images, labels, self.threat, seed=self.seed, step=self.calls - 1, mode="eval")

    def __repr__(self) -> str:
        return f"PGD({type(self.model).__name__}, {self.threat}, seed={self.seed})"


def fast_threat(eps: float) -> LinfThreat:
    """FastAT's adversary: one step of 1.25 ε from a random start (Wong et al., arXiv 2001.03994)."""
    return LinfThreat(eps=eps, alpha=min(SINGLE_STEP * eps, 1.0), num_steps=1, random_start=True)


def fgsm(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    loss: Loss = cross_entropy,
    mode: AttackMode = "as_is",
) -> Tensor:
    """Adversarial images (B, C, H, W) of one step of size eps from the clean image. Arguments as for `pgd`."""
    threat = LinfThreat(eps=eps, alpha=eps, num_steps=1, random_start=False)
    return pgd(model, images, labels, threat, loss=loss, mode=mode)
