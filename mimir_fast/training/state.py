"""The tensors of a training state by their names in a checkpoint, and the few numbers beside them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mimir_fast.checkpoints.reading import load_checkpoint, saved_tensors
from mimir_fast.models.file_names import parameters_by_file_name, to_files
from mimir_fast.training.ema import Ema


def training_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, ema: Ema | None
) -> dict[str, Tensor]:  # fmt: skip
    """Every tensor of a training state by its checkpoint name."""
    tensors = {f"model/{name}": t.detach() for name, t in to_files(model, model.state_dict()).items()}
    if ema is not None:
        tensors |= {f"ema/{name}": t for name, t in ema.state_dict().items()}
    state = {} if optimizer is None else optimizer.state
    for name, parameter in parameters_by_file_name(model):
        for key, value in state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{name}/{key}"] = value
    return tensors


@torch.no_grad()
def load_training(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, ema: Ema | None
) -> None:  # fmt: skip
    """Fill a training state from a checkpoint, without an optimizer only the weights. Collective.

    What had no moving average when it was saved starts from what was saved: what did not train then (--freeze, no EMA),
    and the running statistics of older checkpoints.

    Raises:
        CheckpointError: it is of another architecture.
    """
    if optimizer is not None:
        make_room_for_optimizer(folder, model, optimizer)
    tensors, saved = training_tensors(model, optimizer, ema), saved_tensors(folder)
    late = [name for name in tensors if name.startswith("ema/") and name not in saved]
    load_checkpoint(folder, {name: tensor for name, tensor in tensors.items() if name not in late})
    for name in late:
        tensors[name].copy_(tensors[name.replace("ema/", "model/", 1)])


def make_room_for_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Create the empty optimiser state a checkpoint will be loaded into, as the checkpoint names it."""
    saved = saved_tensors(folder)
    for name, parameter in parameters_by_file_name(model):
        prefix = f"optimizer/{name}/"
        for full_name in (n for n in saved if n.startswith(prefix)):
            info, key = saved[full_name], full_name.removeprefix(prefix)
            scalar = len(info.size) == 0
            # Adam's step counter is a scalar beside the parameter; fused versions want it on the same device.
            empty = torch.zeros((), dtype=info.properties.dtype, device=parameter.device)
            optimizer.state[parameter][key] = empty if scalar else torch.zeros_like(parameter)


def group_steps(optimizer: torch.optim.Optimizer) -> list[int | None]:
    """NVIDIA apex counts steps in its parameter groups, not in the state: those counts, None elsewhere."""
    return [int(group["step"]) if "step" in group else None for group in optimizer.param_groups]


def set_group_steps(optimizer: torch.optim.Optimizer, steps: list[Any]) -> None:
    """Undo `group_steps`. apex wants an int, or, if it counts on the device, a tensor there."""
    for group, step in zip(optimizer.param_groups, steps, strict=False):
        if step is not None:
            before = group.get("step")
            group["step"] = before.new_tensor([step]) if isinstance(before, Tensor) else step
