"""LoRA by PEFT: what trains, how it is saved, and that whoever reads a checkpoint gets plain weights."""

from pathlib import Path

import pytest
import torch
from file_state import file_state
from small_runs import assert_same, last, pretrained, small, stopped_and_resumed

from mimir_fast.checkpoints.reading import checkpoints_of
from mimir_fast.export import ExportConfig, export
from mimir_fast.models.classifier import ClassifierConfig, build_classifier, load_classifier
from mimir_fast.models.families import all_families
from mimir_fast.models.loading import initialize
from mimir_fast.models.lora import LoraConfig, add_lora, merge_lora
from mimir_fast.training.finetuning import FinetuneConfig, finetune


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrained("vit", tmp_path_factory.mktemp("vit") / "run")


class TestLora:
    @pytest.fixture(scope="class")
    def config(self, vit: Path, tmp_path_factory: pytest.TempPathFactory) -> FinetuneConfig:
        pytest.importorskip("peft")
        flags = ["--lora.rank", "4", "--lora.alpha", "8", "--lora.targets", "qkv,fc1"]
        config = small("vit", vit, tmp_path_factory.mktemp("lora") / "run", *flags)
        finetune(config)
        return config

    def test_updates_and_head_train_and_weights_stay(self, config: FinetuneConfig, vit: Path) -> None:
        tensors, before = last(config.folder), last(vit)
        trained = {n.removeprefix("ema/") for n in tensors if n.startswith("ema/")}
        updates = {
            f"blocks.{index}.{layer}.lora_{side}.weight"
            for index in range(4) for layer in ("attn.qkv", "mlp.fc1") for side in "AB"
        }  # fmt: skip
        assert trained == updates | {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}
        assert {n.split("/")[1] for n in tensors if n.startswith("optimizer/")} == trained
        same = [n for n in tensors if n in before]
        assert len(same) == 4 * 12 + 4 and all(torch.equal(tensors[n], before[n]) for n in same)
        assert all(tensors[f"model/{name}"].any() for name in updates)

    def test_resumed_is_bit_exact(self, config: FinetuneConfig, tmp_path: Path) -> None:
        assert_same(stopped_and_resumed(config, tmp_path / "parts"), last(config.folder))

    def test_a_checkpoint_is_read_merged(self, config: FinetuneConfig, tmp_path: Path) -> None:
        """As PEFT computes, before and after a merge of its own; exports and --init see plain weights."""
        tensors = last(config.folder)
        live = build_classifier(config.model, 32, 10)
        add_lora(live, live.encoder, config.lora)
        own = {n.removeprefix("model/"): t for n, t in tensors.items() if n.startswith("model/")}
        names = {name: own[file] for name, file in zip(live.state_dict(), file_state(live), strict=True)}
        live.load_state_dict(names)
        images = torch.rand(2, 3, 32, 32)
        merged = load_classifier(checkpoints_of(config.folder)[-1], "model")
        torch.testing.assert_close(merged(images), live.eval()(images), rtol=1e-4, atol=1e-5)
        layer = live.encoder.blocks[1].attn.qkv
        layer.merge()
        torch.testing.assert_close(layer.base_layer.weight, merged.encoder.blocks[1].attn.qkv.weight)
        exported = export(
            ExportConfig(str(checkpoints_of(config.folder)[-1]), str(tmp_path / "a.safetensors"), weights="model")
        )
        assert torch.equal(load_classifier(exported)(images), merged(images))
        assert "head.weight" in initialize(build_classifier(config.model, 32, 10), config.folder).loaded

    @pytest.mark.parametrize("family", list(all_families()))
    def test_it_changes_every_family_and_starts_from_nothing(self, family: str) -> None:
        pytest.importorskip("peft")
        torch.manual_seed(0)
        patch = 2 if family in ("swin", "convnext") else 8
        model = build_classifier(ClassifierConfig(family, "nano", patch, head_std=1), 32, 4).eval()
        images = torch.rand(2, 3, 32, 32)
        before = model(images)
        add_lora(model, model.encoder, LoraConfig(rank=2))
        torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-4)
        model(images).square().sum().backward()
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert {n for n in trained if "lora_" not in n} == {n for n in trained if n.startswith(("head.", "fc_norm."))}
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        merged = merge_lora(file_state(model), None)
        assert set(merged) == set(file_state(build_classifier(model.config, 32, 4)))


def test_targets_that_are_not_there(vit: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--lora.targets fc3: the linear layers here are fc1, fc2, proj, qkv"):
        finetune(small("vit", vit, tmp_path / "run", "--lora.rank", "4", "--lora.targets", "fc3"))
    assert not (tmp_path / "run").exists()
