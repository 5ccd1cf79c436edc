"""What an attack inside a training step may save, each at a price that its option names. None is on by default.

    every        attack in every k-th step only
    ramp_steps   fewer, larger attack steps at the start of training (fine-tuning)
    precision    the attack's passes in bf16, whatever the training's are in (pre-training)
    visible      all but the last steps of the attack see a share of the patches (fine-tuning)

Not offered: fp8, for which torch has products but no layers (the scales would be ours to keep), and the attack of the
next batch beside this step: its weights would be a step old, so that a resumed run could not repeat it, and on a busy
GPU the two would share what there is.
Shapes: B samples, anything behind; N patches, K visible.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mimir_fast.attacks.ascent import ascend
from mimir_fast.attacks.threat_model import SINGLE_STEP, LinfThreat
from mimir_fast.layers.borrowing import borrowed
from mimir_fast.validation import check_choice, check_number, without

COMPARED_EVERY = 1000
"""Attacks from one comparison of a bf16 attack with fp32 to the next."""


@dataclass
class OccasionalAttack(LinfThreat):
    """An L∞ attack that some training steps do without."""

    every: int = 1
    """Attack every N-th step; other steps use the random start (weaker training): uniform noise of radius eps, or the
    clean image without random_start."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("attack.every", self.every, at_least=1)

    def idle(self) -> dict[str, str]:
        """Options that do nothing as the others are."""
        return super().idle() | without(self.num_steps, "--{}num_steps is 0", "every")

    def attacks_in(self, step: int | Tensor) -> bool:
        """Whether this step attacks. A step on the device was looked at before it went there."""
        return isinstance(step, Tensor) or step % self.every == 0


@dataclass
class ClassifierAttack(OccasionalAttack):
    """An L∞ attack on a classifier inside a training step, and what it saves."""

    visible: float = 1.0
    """Share of the patches that all but the last attack steps see, and move: each the next ones of a random order of
    the image's own, so that all have as many turns. 0.5 makes them half as dear; 1 is all patches in all steps."""
    whole_steps: int = 1
    """Attack steps at the end that see all patches."""
    ramp_steps: int = 0
    """Training steps over which the attack grows from one step to num_steps. Fewer steps are larger: alpha times
    num_steps over their number, at most 1.25 eps (FastAT's). 0: all steps from the start."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("attack.ramp_steps", self.ramp_steps, at_least=0)
        check_number("attack.visible", self.visible, above=0, at_most=1)
        check_number("attack.whole_steps", self.whole_steps, at_least=1)

    def idle(self) -> dict[str, str]:
        """Options that do nothing as the others are."""
        return {
            **super().idle(),
            **without(self.num_steps > 1, f"--{{}}num_steps is {self.num_steps}", "ramp_steps"),
            **without(self.visible < 1, "--{}visible is 1", "whole_steps"),
            **without(self.num_steps > self.whole_steps, "--{}num_steps is at most --{}whole_steps", "visible"),
        }

    def savings(self) -> str:
        """What is saved, in words that go on; empty where nothing is."""
        visible = (
            f", all but {self.whole_steps} on {100 * self.visible:.3g} % of the patches" if self.visible < 1 else ""
        )
        growing = f", from one step on in {self.ramp_steps:,} training steps" if self.ramp_steps else ""
        return visible + growing + (f", in every {self.every}th training step" if self.every > 1 else "")

    def in_training_step(self, step: int) -> "ClassifierAttack":
        """The attack of a training step (counted from 0): weaker ones first (curriculum adversarial training, Cai et
        al., arXiv 1805.04807), each number of attack steps for as many training steps."""
        if step >= self.ramp_steps or self.num_steps <= 1:
            return self
        number = 1 + self.num_steps * step // self.ramp_steps
        alpha = max(self.alpha, min(self.alpha * self.num_steps / number, SINGLE_STEP * self.eps, 1.0))
        return replace(self, num_steps=number, alpha=alpha)

    def places(self, attack_step: int, order_BN: Tensor) -> Tensor | None:
        """(B, K) numbers of the patches that a step of the attack sees, ascending; None for all.

        Args:
            order_BN: all patches of each image, in the order of their turns.
        """
        if self.visible == 1 or attack_step >= self.num_steps - self.whole_steps:
            return None
        num_patches = order_BN.shape[1]
        turns = torch.arange(max(1, round(self.visible * num_patches)), device=order_BN.device)
        return order_BN[:, (attack_step * len(turns) + turns) % num_patches].sort(dim=1).values


@dataclass
class TrainingAttack(OccasionalAttack):
    """An L∞ attack inside a pre-training step, and what it saves."""

    precision: Literal["same", "bf16"] = "same"
    """Of the attack's passes: the `same` as the training's, or `bf16` where that is fp32. Some signs change:
    sign_agreement in the log is the share that does not, measured in the first attack and every 1000th."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("attack.precision", self.precision, ("same", "bf16"))

    def idle(self) -> dict[str, str]:
        """Options that do nothing as the others are."""
        return super().idle() | without(self.num_steps, "--{}num_steps is 0", "precision")

    def compares_in(self, step: int | Tensor) -> bool:
        """Whether this step measures the sign agreement, by a pass in each precision more."""
        if isinstance(step, Tensor) or self.precision == "same" or not (self.num_steps and self.attacks_in(step)):
            return False
        return step // self.every % COMPARED_EVERY == 0


def attack_in_training(
    model: nn.Module, objective: Callable[[Any, Tensor], Tensor], clean: Tensor, start: Tensor, threat: TrainingAttack,
    step: int | Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The perturbed input (B, …) of a training step, detached, and scalars to log of it.

    In a step without attack that is `start`. "sign_agreement" is the share of the numbers that the first step moves the
    same way in the attack's precision and in fp32.

    Args:
        objective: (bare model, input (B, …)) → values to be maximised, as in `ascend`; the model is borrowed for it.
        clean, start: (B, …), as in `ascend`.
        step: its number, on the host or on the device.
    """
    if not threat.attacks_in(step):
        return start, {}

    autocast = partial(torch.autocast, start.device.type)

    def ascent(threat: TrainingAttack, precision: str) -> Tensor:
        context = nullcontext() if precision == "same" else autocast(dtype=torch.bfloat16, enabled=precision == "bf16")
        with borrowed(model) as module, context:
            return ascend(partial(objective, module), clean, start, threat)

    log = {}
    if threat.compares_in(step):
        coarse, exact = (ascent(replace(threat, num_steps=1), precision) for precision in (threat.precision, "fp32"))
        log["sign_agreement"] = (coarse == exact).float().mean()
    return ascent(threat, threat.precision), log
