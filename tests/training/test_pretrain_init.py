"""pretrain --init: from our runs, MAE's files, timm's and classifiers; the decoder where it is the same; resumed."""

import argparse
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from file_state import file_state
from safetensors.torch import save_file
from small_runs import assert_same, last, pretrained
from torch import Tensor

from mimir_fast.models.classifier import ClassifierConfig, build_classifier
from mimir_fast.models.masked_model import ModelConfig, build_masked_model
from mimir_fast.models.weight_files import WeightsError
from mimir_fast.pretrain import config_from
from mimir_fast.training.pretraining import Pretraining, pretrain

SMALL = [
    "--data.limit", "32", "--batch_size", "16", "--max_steps", "3", "--save_every", "1", "--device", "cpu",
    "--precision", "fp32",
]  # fmt: skip


def config(init: Path, *extra: str, recipe: str = "digits/mimir_vit_nano") -> Any:
    return config_from(["--recipe", recipe, *SMALL, "--init", str(init), *extra])


def task(init: Path, *extra: str, recipe: str = "digits/mimir_vit_nano") -> tuple[dict[str, Tensor], str]:
    """The tensors that a run starts with, and what it says."""
    made = Pretraining(config(init, *extra, recipe=recipe))
    return file_state(made.model), made.describe(32)


def differing(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> set[str]:
    return {n.split(".")[0] for n in found if n not in wanted or not torch.equal(found[n], wanted[n])}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrained("vit", tmp_path_factory.mktemp("vit") / "run")


@pytest.fixture(scope="module")
def tensors(run: Path) -> dict[str, Tensor]:
    return {name.removeprefix("model/"): t for name, t in last(run).items()}


def test_our_run_with_its_decoder(run: Path, tensors: dict[str, Tensor]) -> None:
    found, said = task(run)
    assert differing(found, tensors) == set() and found.keys() == tensors.keys()
    assert f"loaded   {len(tensors)} tensors" in said and "the decoder is loaded" in said


def test_maes_file_has_another_decoder(tmp_path: Path) -> None:
    torch.manual_seed(5)
    source = build_masked_model(ModelConfig(encoder="nano", patch_size=8, decoder="mae"), 32)
    args = argparse.Namespace(model="mae_vit_nano", norm_pix_loss=True)
    torch.save({"model": file_state(source), "epoch": 799, "args": args}, tmp_path / "mae.pth")
    found, said = task(tmp_path / "mae.pth")
    decoder = {"mask_token", "decoder_embed", "decoder_blocks", "decoder_norm", "decoder_pred", "decoder_pos_embed"}
    assert differing(found, file_state(source)) == decoder
    assert "the decoder of these weights is not the model's: it starts fresh" in said
    assert "decoder_blocks.* (24)" in said  # of what is fresh, and not 24 names
    found, said = task(tmp_path / "mae.pth", "--model.decoder", "mae")
    assert differing(found, file_state(source)) == set() and "the decoder is loaded" in said


def test_timms_file_has_none(tmp_path: Path) -> None:
    timm_vit = pytest.importorskip("timm.models.vision_transformer")
    source = timm_vit.VisionTransformer(img_size=64, patch_size=16, embed_dim=96, depth=4, num_heads=3, num_classes=7)
    save_file(source.state_dict(), tmp_path / "timm.safetensors")
    found, said = task(tmp_path / "timm.safetensors")
    assert torch.equal(found["blocks.3.mlp.fc2.weight"], source.blocks[3].mlp.fc2.weight)
    assert torch.equal(found["norm.weight"], source.norm.weight)
    assert "patch_embed.proj.weight (96, 3, 16, 16) -> (96, 3, 8, 8)" in said and "skipped  head.* (2)" in said
    assert "no decoder in these weights: it starts fresh" in said


def test_norms_for_adversarial_images_start_as_the_clean_ones(run: Path, tensors: dict[str, Tensor]) -> None:
    found, said = task(run, recipe="digits/aemim_vit_nano")
    assert torch.equal(found["blocks.2.norm1.weight_adversarial"], tensors["blocks.2.norm1.weight"])
    assert torch.equal(found["cls_token_adversarial"], tensors["cls_token"])
    assert "19 tensors for adversarial images, not in these weights: copied from clean" in said


def test_a_linear_decoder_and_a_head(run: Path, tmp_path: Path) -> None:
    _, said = task(run, recipe="digits/simmim_vit_nano")
    assert "the decoder of these weights is not the model's" in said
    source = build_classifier(ClassifierConfig("vit", "nano", 8, global_pool="cls"), 32, 10)
    save_file(file_state(source), tmp_path / "a.safetensors")
    found, said = task(tmp_path / "a.safetensors", recipe="digits/single_stage_vit_nano")
    assert torch.equal(found["head.weight"], source.head.weight) and "the head is loaded" in said


def test_resumed_without_the_file_is_bit_exact(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    init = tmp_path / "init"
    shutil.copytree(run, init)
    flags = ("--freeze", "encoder", "--ema_decay", "0.9")
    whole = last(pretrain(config(init, *flags, "--output_dir", str(tmp_path / "whole"))))
    assert "initialised from" in capsys.readouterr().out
    parts = config(init, *flags, "--output_dir", str(tmp_path / "parts"))
    pretrain(replace(parts, run=replace(parts.run, stop_after=1)))
    shutil.rmtree(init)
    pretrain(parts)
    assert_same(last(tmp_path / "parts"), whole)
    assert {n for n in whole if n.startswith("ema/")} and not any(n.startswith("ema/blocks") for n in whole)
    with pytest.raises(FileExistsError, match=r"init: .*init -> .*other"):
        pretrain(config(tmp_path / "other", *flags, "--output_dir", str(tmp_path / "parts")))


def test_bad_weights_leave_nothing(tmp_path: Path) -> None:
    save_file({"conv1.weight": torch.zeros(1)}, tmp_path / "resnet.safetensors")
    for name, message in (("resnet.safetensors", "holds no vision transformer"), ("x", "does not exist")):
        with pytest.raises(WeightsError, match=message):
            pretrain(config(tmp_path / name, "--output_dir", str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()
