"""The models that LGV collects around another one, kept on disk: an evaluation that goes on attacks the same ones."""

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from mimir_fast.attacks.lgv import collect
from mimir_fast.checkpoints.durable import write_whole
from mimir_fast.checkpoints.tensor_files import save_tensors
from mimir_fast.data.build import build_loader
from mimir_fast.data.config import DataConfig

AN_EPOCH, BATCH = 4, 256
"""Models of an epoch and images of an SGD step, as the paper has them."""


def lgv_models(
    model: nn.Module, folder: Path, data: DataConfig, *, epochs: int, lr: float, seed: int
) -> list[nn.Module]:  # fmt: skip
    """Models on the model's device, four an epoch: those in the folder, else collected and written there.

    Args:
        folder: named by all that the models depend on.
        data: its training split; images are taken as they are evaluated, neither shifted nor mirrored.
    Raises:
        ValueError: see `collect`.
        MissingDataError: there is no training split.
    """
    files = [folder / f"{number:03d}.safetensors" for number in range(AN_EPOCH * epochs)]
    if all(file.exists() for file in files):
        return [_read(model, file) for file in files]
    device = next(model.parameters()).device
    loader = build_loader(data, split="train", batch_size=BATCH, device=device, augment=False, seed=seed)
    try:
        every = max(1, loader.num_samples // (BATCH * AN_EPOCH))
        models = collect(
            model, ((b.images.float() / 255, b.labels) for b in loader), count=len(files), every=every, lr=lr, seed=seed
        )
    finally:
        loader.close()
    folder.mkdir(parents=True, exist_ok=True)
    for file, collected in zip(files, models, strict=True):
        _write(collected, file)
    return models


def _write(model: nn.Module, file: Path) -> None:
    # Cloned: shared weights have several names, which the format does not know.
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in _state(model)}
    write_whole(file, partial(save_tensors, tensors))


@torch.no_grad()
def _read(model: nn.Module, file: Path) -> nn.Module:
    from safetensors.torch import load_file

    found, saved = copy.deepcopy(model).eval(), load_file(file)
    for name, tensor in _state(found):
        tensor.copy_(saved[name])
    return found


def _state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights and buffers, also those that state dicts leave out."""
    yield from model.named_parameters()
    yield from model.named_buffers()
