"""Fine-tuning runs of a few steps from a pre-trained encoder, and what they leave."""

from dataclasses import replace
from pathlib import Path

import torch
from file_state import file_state
from torch import Tensor

from mimir_fast.checkpoints.reading import checkpoints_of, read_tensors
from mimir_fast.checkpoints.saving import save_checkpoint
from mimir_fast.finetune import config_from
from mimir_fast.models.masked_model import ModelConfig, build_masked_model
from mimir_fast.training.finetuning import FinetuneConfig, finetune

SMALL = [
    "--data.limit", "48", "--batch_size", "16", "--max_steps", "3", "--log_every", "1", "--save_every", "2",
    "--attack.num_steps", "1", "--probe.num_images", "0", "--ema_decay", "0.9", "--layer_decay", "0.75",
    "--model.drop_path", "0.2", "--device", "cpu", "--precision", "fp32",
]  # fmt: skip


def small(family: str, init: Path, folder: Path, *extra: str) -> FinetuneConfig:
    line = ["--recipe", f"digits/pgd_{family}_nano", "--init", str(init), *SMALL, "--output_dir", str(folder), *extra]
    return config_from(line)


def last(run: Path) -> dict[str, Tensor]:
    """All tensors of its newest checkpoint."""
    return read_tensors(checkpoints_of(run)[-1], "")


def pretrained(family: str, folder: Path) -> Path:
    """What a pre-training run leaves."""
    torch.manual_seed(0)
    model = build_masked_model(ModelConfig(family=family, encoder="nano", patch_size=8), image_size=32)
    tensors = {f"model/{n}": t.detach() for n, t in file_state(model).items()}
    save_checkpoint(folder / "checkpoints" / "step-00000009", tensors, {"step": 9, "kind": "pretrain", "config": {}})
    return folder


def stopped_and_resumed(config: FinetuneConfig, folder: Path) -> dict[str, Tensor]:
    config = replace(config, run=replace(config.run, output_dir=str(folder)))
    finetune(replace(config, run=replace(config.run, stop_after=1)))
    finetune(config)
    return last(folder)


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in wanted)
