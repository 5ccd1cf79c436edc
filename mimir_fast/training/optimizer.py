"""The optimiser: AdamW (fused where the device has it), or NVIDIA apex's FusedAdam / FusedLAMB when really installed.

Parameters are grouped by weight decay (matrices only) and, for layer-wise decay, by depth: group k's learning rate is
multiplied by layer_decay^(L − k) (Clark et al. 2020; BEiT, arXiv 2106.08254). The learning rate is a function of the
step, so that resuming needs no state.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mimir_fast.models.encoder import POSITION_BIAS, PREFIX_TOKENS
from mimir_fast.models.file_names import parameters_by_file_name
from mimir_fast.validation import check_fields, check_number, without


@dataclass
class OptimizerConfig:
    """Optimiser, weight decay, and the learning rate over the steps."""

    optimizer: Literal["adamw", "sgd", "apex_adam", "apex_lamb"] = "adamw"
    """`apex_*` need NVIDIA apex built from source (the `apex` on PyPI is another project)."""
    blr: float = 1.5e-4
    """Base learning rate: lr = blr · batch_size / 256."""
    lr: float | None = None
    """Absolute learning rate; overrides blr."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine."""
    lr_drops: tuple[float, ...] = ()
    """Parts of the run from which on the learning rate is a tenth of what it was, in place of the cosine: 0.875 is
    SimMIM's 700 of 800 epochs."""
    weight_decay: float = 0.05
    """Decoupled weight decay of matrices; biases, norms and tokens have none."""
    decay_position_bias: bool = False
    """Decay Swin's tables of relative positions too: its own authors do not, the MIMIR authors' pre-training does."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's β₁ and β₂."""
    layer_decay: float = 1.0
    """Learning-rate factor from one layer to the one below it; 1 is none."""
    momentum: float = 0.9
    """Of SGD."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_number("blr", self.blr, above=0)
        if self.lr is not None:
            check_number("lr", self.lr, above=0, hint="leave it out to use blr")
        for name, value in (("min_lr", self.min_lr), ("weight_decay", self.weight_decay)):
            check_number(name, value, at_least=0)
        for beta in self.betas:
            check_number("betas", beta, at_least=0, below=1)
        check_number("layer_decay", self.layer_decay, above=0, at_most=1, hint="1 is none")
        check_number("momentum", self.momentum, at_least=0, below=1)
        if not all(0 < part < 1 for part in self.lr_drops):
            raise ValueError(f"lr_drops={self.lr_drops}, wanted parts of the run between 0 and 1, such as 0.875")

    def idle(self) -> dict[str, str]:
        """Options that do nothing as the others are."""
        return {
            **without(self.lr is None, "--{}lr is given", "blr"),
            **without(not self.lr_drops, "--{}lr_drops replaces the cosine", "min_lr"),
            **without(self.optimizer == "sgd", "--{}optimizer is not sgd", "momentum"),
            **without(self.optimizer != "sgd", "--{}optimizer is sgd", "betas"),
        }

    def peak_lr(self, batch_size: int) -> float:
        """The learning rate after warm-up for a global batch."""
        return self.lr if self.lr is not None else self.blr * batch_size / 256

    def lr_at(self, step: int, *, batch_size: int, total_steps: int, warmup_steps: int) -> float:
        """The learning rate of `step` (0-based) for a global batch."""
        peak = self.peak_lr(batch_size)
        if self.lr_drops:
            return stepped_schedule(
                step, total_steps=total_steps, warmup_steps=warmup_steps, peak=peak, drops=self.lr_drops
            )
        return cosine_schedule(step, total_steps=total_steps, warmup_steps=warmup_steps, peak=peak, minimum=self.min_lr)


def parameter_groups(
    model: nn.Module, weight_decay: float, layer_decay: float, decay_position_bias: bool = False
) -> list[dict[str, Any]]:
    """Groups with `params`, `weight_decay` and `lr_scale`, in a fixed order.

    The model says which layer a parameter is of: 0 for the embedding, 1 … L, L + 1 for what comes after.
    """
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in parameters_by_file_name(model):
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim > 1 and not name.startswith((*PREFIX_TOKENS, "mask_token", "pos_embed"))
        decays &= decay_position_bias or not name.endswith(POSITION_BIAS)
        layer, scale = 0, 1.0
        if layer_decay < 1:
            layer = model.layer_of(name)  # type: ignore[operator]
            scale = layer_decay ** (model.num_layers + 1 - layer)  # type: ignore[operator]
        empty = {"params": [], "weight_decay": weight_decay if decays else 0.0, "lr_scale": scale}
        groups.setdefault((layer, decays), empty)["params"].append(parameter)
    return list(groups.values())


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimiser over the trainable parameters; lr is set by the loop at every step.

    Raises:
        ImportError: apex is asked for and NVIDIA's is not installed.
    """
    groups = parameter_groups(model, config.weight_decay, config.layer_decay, config.decay_position_bias)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, fused=supports_fused(groups))
    apex = nvidia_apex()
    kind = apex.FusedAdam if config.optimizer == "apex_adam" else apex.FusedLAMB
    return kind(groups, lr=0.0, betas=config.betas)


def supports_fused(groups: list[dict[str, Any]]) -> bool:
    """Fused AdamW exists for these parameters' devices (CPU and CUDA have it) and they are floating point."""
    parameters = [p for group in groups for p in group["params"]]
    return all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)


def nvidia_apex() -> Any:
    """The module `apex.optimizers` of NVIDIA apex.

    Raises:
        ImportError: apex is absent, or is the unrelated PyPI package of that name.
    """
    try:
        from apex import optimizers  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise ImportError(
            "NVIDIA apex is not installed (the `apex` on PyPI is an unrelated package): build it from NVIDIA's source, "
            "or use --optimizer adamw, which is fused as well"
        ) from error
    if not hasattr(optimizers, "FusedAdam"):
        raise ImportError("the installed `apex` is not NVIDIA's: pip uninstall apex, then build NVIDIA's from source")
    return optimizers


def clip_gradients(model: nn.Module, largest: float | None) -> Tensor:
    """Scale all gradients down to the norm `largest`, unless it is None; the norm they had, 0-d, over all shards."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if largest is not None:
        nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    # A DTensor's, whose class is not imported for the sake of --help.
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def cosine_schedule(step: int, *, total_steps: int, warmup_steps: int, peak: float, minimum: float = 0.0) -> float:
    """The learning rate of `step` (0-based): linear warm-up, then half a cosine from `peak` down to `minimum`."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def stepped_schedule(step: int, *, total_steps: int, warmup_steps: int, peak: float, drops: Sequence[float]) -> float:
    """The learning rate of `step` (0-based): linear warm-up, then `peak`, divided by 10 at each part in `drops`."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * 0.1 ** sum(step >= round(part * total_steps) for part in drops)
