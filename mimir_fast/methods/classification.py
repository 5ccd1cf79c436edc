"""What the fine-tuning methods share: a batch made ready (augmented, mixed, smoothed), and the plain loss.

A method is called as `method(model, batch, seed=, step=)` and returns {"loss": …, other scalars}. It owns no loop, no
optimiser and no device. All randomness is a function of (seed, epoch or step, sample).

Attacks see the model in eval mode where the method's authors attack so, else as it trains, and without stochastic
depth, whose factors are given to the training forward only.
Shapes: B images, C channels, H × W pixels, K classes, L blocks.
"""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from mimir_fast.attacks.pgd import Loss, check_images, cross_entropy, is_correct, linf_ascent, random_start
from mimir_fast.attacks.training_attack import ClassifierAttack
from mimir_fast.data.batch import Batch
from mimir_fast.layers.borrowing import AttackMode, borrowed, unwrap
from mimir_fast.methods.augmentation import RandAugmentConfig, rand_augment
from mimir_fast.methods.mixing import MixingConfig, mix, smooth_labels
from mimir_fast.methods.registry import Objective
from mimir_fast.models.branches import draw_drop_path
from mimir_fast.models.classifier import Classifier
from mimir_fast.ops.random_masks import random_masks
from mimir_fast.philox import Stream
from mimir_fast.validation import check_choice, without


def default_attack() -> ClassifierAttack:
    """PGD-10 of the CIFAR-10 recipes: ε 8/255, α 2/255, random start."""
    return ClassifierAttack(eps=8 / 255, alpha=2 / 255, num_steps=10, random_start=True)


OF_AN_ATTACK = (
    "attack.alpha", "attack.num_steps", "attack.random_start", "attack.every", "attack.visible", "attack.whole_steps",
    "attack.ramp_steps", "attack_mode",
)  # fmt: skip
"""Options of a search before the training pass, which a method without one does not have."""


@dataclass
class ClassificationConfig(Objective):
    """Options of every fine-tuning method; a method that has more adds them as one field of its own name."""

    attack: ClassifierAttack = field(default_factory=default_attack)
    """The adversary of training; `fast` and `free` use its eps, `apgd` eps and num_steps, `natural` none of it."""
    attack_mode: Literal["auto", "eval", "train"] = "auto"
    """Whether batch norms normalise by running statistics under attack (`eval`) or by the batch's, as in training; they
    keep neither. auto: as the method's authors; of pgd and fast `train`, in XCiT's recipes of MIMIR's rows `eval`."""
    label_smoothing: float = 0.0
    """Probability taken from the true class and spread over all."""
    randaugment: RandAugmentConfig = field(default_factory=RandAugmentConfig)
    mixing: MixingConfig = field(default_factory=MixingConfig)

    def __post_init__(self) -> None:
        if not isinstance(self.attack, ClassifierAttack):  # a plain LinfThreat will do
            self.attack = ClassifierAttack(**asdict(self.attack))
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing={self.label_smoothing}, wanted 0 <= smoothing < 1, such as 0.1")
        check_choice("attack_mode", self.attack_mode, ("auto", "eval", "train"))

    def idle(self) -> dict[str, str]:
        """Options that do nothing as the others are."""
        return without(self.attack.num_steps, "--{}attack.num_steps is 0", "attack_mode")


@dataclass
class Inputs:
    """A batch made ready for a method.

    Attributes:
        images: (B, C, H, W) float32 in [0, 1].
        targets: (B,) int64, or (B, K) probabilities under mixing or smoothing.
        samples, epochs: (B,) int64, as in Batch.
        seed, step: the other coordinates of all randomness.
        branch_scales: (B, L, R) factors of stochastic depth, or None.
    """

    images: Tensor
    targets: Tensor
    samples: Tensor
    epochs: Tensor
    seed: int
    step: int
    branch_scales: Tensor | None


class ClassificationMethod(ABC):
    """Base of the fine-tuning methods.

    Attributes:
        adversarial: it trains against an adversary, so the best checkpoint is the one of highest PGD accuracy, and
            catastrophic overfitting can happen.
        authors_mode: of the model under attack, in the authors' code; `as_is` is that of training.
        replays: steps in turn that are made with the same batch.
        attack: what searches for the perturbation.
    """

    adversarial: ClassVar[bool] = True
    authors_mode: ClassVar[AttackMode] = "as_is"
    replays: int = 1

    def __init__(self, config: ClassificationConfig) -> None:
        self.config, self.attack = config, config.attack

    def __call__(self, model: nn.Module, batch: Batch, *, seed: int, step: int) -> dict[str, Tensor]:
        """{"loss": scalar, "accuracy": of the training pass, …}; `model` may be wrapped for data parallelism."""
        return self.losses(model, self.prepare(model, batch, seed=seed, step=step))

    @abstractmethod
    def losses(self, model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
        """{"loss": scalar to minimise, other detached scalars} of one step on the prepared inputs."""

    def adversary(self) -> str:
        """The adversary of training in words, for a run's headline; empty where there is none."""
        attack = self.config.attack
        steps = f"{attack.num_steps} steps of {255 * attack.alpha:.3g}/255"
        return f"eps {255 * attack.eps:.3g}/255, {steps}{attack.savings()}"

    def perturb(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """Adversarial images (B, C, H, W) in [0, 1], by the model in the attack's mode; it is left untouched.

        In a step without attack they are its start.
        """
        if not self.attack.attacks_in(inputs.step):
            return self.start(inputs)
        modes: dict[str, AttackMode] = {"auto": self.authors_mode, "eval": "eval", "train": "as_is"}
        with borrowed(model, modes[self.config.attack_mode]) as module:
            return self.search(module, inputs)

    def start(self, inputs: Inputs) -> Tensor:
        """Where an attack starts, (B, C, H, W) in [0, 1]: uniformly in the ball, or at the images."""
        if not self.attack.random_start:
            return inputs.images
        return random_start(inputs.images, self.attack.eps, samples=inputs.samples, seed=inputs.seed, step=inputs.step)

    def search(self, module: nn.Module, inputs: Inputs) -> Tensor:
        """Adversarial images by a model on loan: here where the cross entropy is high."""
        return self.ascend(module, inputs, cross_entropy, inputs.targets)

    def ascend(self, module: nn.Module, inputs: Inputs, loss: Loss, labels: Tensor) -> Tensor:
        """Adversarial images by PGD on a loss, whose early steps may see a part of the patches."""
        attack, images, places = self.attack.in_training_step(inputs.step), inputs.images, None
        check_images(images, values=images.device.type == "cpu")
        if attack.visible < 1:
            number, step = classifier(module).encoder.num_patches, inputs.step
            order, _ = random_masks(
                inputs.samples, number, number, seed=inputs.seed, step=step, stream=Stream.ATTACK_MASK, order="shuffled"
            )

        def before_step(step: int, x: Tensor) -> Tensor:
            nonlocal places
            places = attack.places(step, order) if attack.visible < 1 else None
            return x

        def objective(x: Tensor) -> Tensor:
            return loss(module(x) if places is None else module(x, places_BV=places), labels)

        return linf_ascent(objective, images, self.start(inputs), attack, before_step=before_step)

    def preview(self, model: nn.Module, batch: Batch, *, seed: int, step: int) -> dict[str, Tensor]:
        """Rows (B, C, H, W) in [0, 1]: images, and of an adversarial method what its attack makes of them, and the
        difference, magnified to full range."""
        images = batch.images.float() / 255 if batch.images.dtype == torch.uint8 else batch.images
        if not self.adversarial:
            return {"input": images}
        step -= step % self.attack.every  # one that attacks
        adversarial = self.perturb(model, Inputs(images, batch.labels, batch.samples, batch.epochs, seed, step, None))
        difference = 0.5 + 0.5 * (adversarial - images) / max(self.config.attack.eps, 1e-9)
        return {"input": images, "adversarial": adversarial, "difference": difference}

    def prepare(self, model: nn.Module, batch: Batch, *, seed: int, step: int) -> Inputs:
        """Augment, scale to [0, 1], mix, smooth, and draw stochastic depth."""
        bare = classifier(model)
        images, targets = batch.images, batch.labels
        if self.config.randaugment.enabled:
            images = rand_augment(self.config.randaugment, images, batch.samples, batch.epochs, seed=seed)
        if images.dtype == torch.uint8:
            images = images.float() / 255
        if self.config.mixing.enabled or self.config.label_smoothing:
            targets = smooth_labels(targets, bare.num_classes, self.config.label_smoothing)
            images, targets = mix(self.config.mixing, images, targets, batch.samples, batch.epochs, seed=seed)
        scales = draw_drop_path(
            bare.config.drop_path, bare.num_layers, bare.encoder.num_branches, batch.samples, seed=seed, step=step,
            law=bare.config.drop_path_law,
        )  # fmt: skip
        return Inputs(images, targets, batch.samples, batch.epochs, seed, step, scales)


def classifier(model: nn.Module) -> Classifier:
    """The bare classifier inside whatever wraps it."""
    return cast(Classifier, unwrap(model))


def train_logits(model: nn.Module, images: Tensor, branch_scales: Tensor | None) -> Tensor:
    """(B, K) fp32 logits of the training forward."""
    logits: Any = model(images) if branch_scales is None else model(images, branch_scales)
    return logits.float()


def plain_losses(model: nn.Module, images: Tensor, inputs: Inputs) -> dict[str, Tensor]:
    """{"loss": mean cross entropy, "accuracy"}, both scalars, of a training forward on these images."""
    logits = train_logits(model, images, inputs.branch_scales)
    return {"loss": cross_entropy(logits, inputs.targets).mean(), "accuracy": accuracy(logits, inputs.targets)}


def both_logits(model: nn.Module, inputs: Inputs, adversarial: Tensor) -> tuple[Tensor, Tensor]:
    """(B, K) fp32 logits of the clean and of the adversarial images, each by a training forward of its own.

    Both go through the same sub-network of stochastic depth. A batch norm sees the clean ones first.
    """
    scales = inputs.branch_scales
    return train_logits(model, inputs.images, scales), train_logits(model, adversarial, scales)


def accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    """Part of the batch whose largest logit is the (heaviest) true class, a detached scalar; see `is_correct`."""
    truth = targets if targets.ndim == 1 else targets.argmax(dim=1)
    return is_correct(logits.detach(), truth).float().mean()
