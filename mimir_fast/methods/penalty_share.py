r"""A penalty held at a constant share S of the loss's gradient, whatever its scale is and becomes.

    λ_t = S / r̄_{t−1},     r̄_t = β·r̄_{t−1} + (1 − β)·r_t,     r_t = ‖∂I/∂z‖₂ / ‖∂L/∂z‖₂

z is the latent, L the reconstruction's error and I the penalty's estimate before λ. Both gradients enter the encoder
there and go through the same layers, so the norms at z compare them before what they share. They cost next to nothing:
the first is computed once, by autograd through the estimator alone, and handed to the training pass as a constant; the
second is what arrives at z in that pass without the first. The norms are over all micro-batches and ranks of a step, so
λ is the same everywhere. Step 0, of which no ratio is known, has λ = 0.

The moving average is the state: λ does not follow the noise of single batches, which would make another objective of
each. A step whose ratio is no positive number leaves it as it was.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from mimir_fast.ops.global_batch import group_size

DECAY = 0.5  # β: the ratio changes by per cents a step early on, and is hardly noisy


class PenaltyShare:
    """λ of one run.

    Args:
        share: S, > 0.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.ratio: Tensor | None = None
        """r̄, a float64 scalar, NaN while no step had one; None before the first step."""
        self.realised: Tensor | None = None
        """λ_t·r_t of the last step that is known."""
        self._squares: Tensor | None = None  # (2,) of ∂I/∂z and ∂L/∂z, this rank's sums over the step so far

    @property
    def weight(self) -> Tensor | None:
        """λ of the step that is under way, a float64 scalar, 0 where no ratio is known; None before the first step."""
        return None if self.ratio is None else (self.share / self.ratio).nan_to_num(0.0, 0.0, 0.0)

    def begin(self) -> None:
        """Take in what the step before showed, before the next one. Collective where there are ranks."""
        if self._squares is None:
            return
        if group_size() > 1:
            dist.all_reduce(self._squares)
        penalty, loss = self._squares.sqrt()
        ratio, self._squares = penalty / loss, None
        weight = self.weight
        self.realised = torch.zeros_like(ratio) if weight is None else (weight * ratio).nan_to_num(0.0, 0.0, 0.0)
        ratio = torch.where(ratio.isfinite() & (ratio > 0), ratio, torch.nan)
        before = ratio if self.ratio is None else torch.where(self.ratio.isnan(), ratio, self.ratio)
        self.ratio = torch.where(ratio.isnan(), before, DECAY * before + (1 - DECAY) * ratio)

    def watch(self, loss: Tensor, latent: Tensor, gradient: Tensor) -> Tensor:
        """λ of this training pass, whose backward pass measures ∂L/∂z.

        Args:
            loss: L, a scalar of the pass, to which the total adds λ·I.
            latent: z, through which all of the pass's gradients to the encoder go.
            gradient: ∂I/∂z, a constant of z's shape, by which λ·I is differentiated.
        """
        known = self.weight
        weight = latent.new_zeros((), dtype=torch.float32) if known is None else known.float()
        scales: list[Tensor] = []  # by which the loop weighs this pass

        def measure(arrived: Tensor) -> None:
            mine = scales.pop() * gradient
            squares = torch.stack([mine.double().square().sum(), (arrived - weight * mine).double().square().sum()])
            self._squares = squares if self._squares is None else self._squares + squares

        if loss.requires_grad and latent.requires_grad:
            loss.register_hook(scales.append)
            latent.register_hook(measure)
        return weight

    def shown(self, device: torch.device) -> Tensor:
        """`realised` for a log, 0 while nothing is known: a float32 scalar on the device."""
        return torch.zeros((), device=device) if self.realised is None else self.realised.float()

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint holds, as JSON knows it; {} where nothing is known. Collective where there are ranks."""
        self.begin()
        if self.ratio is None or self.realised is None or bool(self.ratio.isnan()):
            return {}
        return {"ratio": self.ratio.item(), "realised": self.realised.item()}

    def load_state_dict(self, state: dict[str, float], device: torch.device) -> None:
        """Undo `state_dict`; {} is a run that has not begun."""
        values = {name: torch.tensor(value, dtype=torch.float64, device=device) for name, value in state.items()}
        self.ratio, self.realised, self._squares = values.get("ratio"), values.get("realised"), None
