"""Frozen layers: they stay, cost nothing, and count from the input; flags that do not go together."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import Command
from small_runs import SMALL, assert_same, last, pretrained, small, stopped_and_resumed

from mimir_fast.finetune import config_from
from mimir_fast.layers.borrowing import borrowed
from mimir_fast.layers.norms import BatchNorm
from mimir_fast.models.classifier import ClassifierConfig, build_classifier
from mimir_fast.models.families import all_families
from mimir_fast.models.freezing import freeze
from mimir_fast.training.finetuning import FinetuneConfig, finetune


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrained("vit", tmp_path_factory.mktemp("vit") / "run")


class TestFreezing:
    @pytest.fixture(scope="class")
    def config(self, vit: Path, tmp_path_factory: pytest.TempPathFactory) -> FinetuneConfig:
        return small("vit", vit, tmp_path_factory.mktemp("frozen") / "run", "--freeze", "2")

    def test_what_is_frozen_stays_and_costs_nothing(
        self, config: FinetuneConfig, vit: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        tensors, before = last(finetune(config)), last(vit)
        for name in (n.removeprefix("model/") for n in tensors if n.startswith("model/")):
            stays = name.startswith(("cls_token", "pos_embed", "patch_embed.", "blocks.0.", "blocks.1."))
            assert stays == (f"optimizer/{name}/exp_avg" not in tensors) == (f"ema/{name}" not in tensors), name
            if f"model/{name}" in before:
                assert torch.equal(tensors[f"model/{name}"], before[f"model/{name}"]) == stays, name
        out = capsys.readouterr().out
        trained = sum(t.numel() for n, t in tensors.items() if n.startswith("ema/")) / 1e6
        assert ", first 2 layers frozen" in out and f"{trained:.2g} of 0.5 M parameters train" in out
        assert json.loads((config.folder / "config.json").read_text())["freeze"] == "2"

    def test_resumed_is_bit_exact(self, config: FinetuneConfig, tmp_path: Path) -> None:
        assert_same(stopped_and_resumed(config, tmp_path / "parts"), last(finetune(config)))

    def test_layers_thaw_in_a_resumed_run(self, config: FinetuneConfig, tmp_path: Path) -> None:
        """With --allow_changes; what has trained goes on, the rest starts its optimiser state and average."""
        run = replace(config.run, output_dir=str(tmp_path / "run"), stop_after=2, save_every=1)
        first = last(finetune(replace(config, run=run)))
        thawed = replace(config, freeze="", run=replace(run, stop_after=None, allow_changes=True))
        with pytest.raises(FileExistsError, match="freeze: 2 -> "):
            finetune(replace(thawed, run=replace(thawed.run, allow_changes=False)))
        tensors = last(finetune(thawed))
        name = "blocks.0.attn.qkv.weight"
        weight, before = tensors[f"model/{name}"], first[f"model/{name}"]
        assert not torch.equal(weight, before) and tensors[f"optimizer/{name}/step"] == 1
        torch.testing.assert_close(tensors[f"ema/{name}"], torch.lerp(before, weight, 0.1))
        assert tensors["optimizer/head.weight/step"] == 3

    @pytest.mark.slow
    def test_shards_train_the_same(self, config: FinetuneConfig, vit: Path, tmp_path: Path, command: Command) -> None:
        """FSDP2 on two ranks, recomputing activations, against one process."""
        out = command(
            "mimir_fast.finetune", "--recipe", "digits/pgd_vit_nano", "--init", str(vit), *SMALL, "--freeze", "2",
            "--output_dir", str(tmp_path / "two"), "--strategy", "fsdp", "--checkpoint_activations", ranks=2,
        )  # fmt: skip
        assert out.returncode == 0, out.stdout + out.stderr
        found, whole = last(tmp_path / "two"), last(finetune(config))
        assert found.keys() == whole.keys()
        for name in (n for n in whole if n.startswith("model/")):
            torch.testing.assert_close(found[name], whole[name], rtol=2e-3, atol=2e-4)

    def test_batch_norms_keep_their_statistics(self) -> None:
        model = build_classifier(ClassifierConfig("xcit", "nano", 8), 32, 4)
        freeze(model, model.encoder, "2")
        before = {name: t.clone() for name, t in model.named_buffers()}
        model.train()(torch.rand(3, 3, 32, 32)).sum().backward()
        for index in range(4):
            name = f"encoder.blocks.{index}.local_mp.bn.running_mean"
            assert torch.equal(model.get_buffer(name), before[name]) == (index < 2)
        name = "encoder.patch_embed.proj.0.1.running_var"
        assert torch.equal(model.get_buffer(name), before[name])

    def test_a_frozen_batch_norm_is_in_eval_mode_under_every_attack(self) -> None:
        norm = BatchNorm(3)
        norm.freeze()
        model = torch.nn.Sequential(norm).train()
        x = torch.randn(5, 3)
        with borrowed(model, "train") as module:
            torch.testing.assert_close(module(x), x, rtol=1e-4, atol=1e-4)
        assert model.training and not norm.training and norm.num_batches_tracked == 0

    @pytest.mark.parametrize("family", list(all_families()))
    def test_layers_count_from_the_input(self, family: str) -> None:
        patch = 2 if family in ("swin", "convnext") else 8
        model = build_classifier(ClassifierConfig(family, "nano", patch), 32, 4)
        depth = model.num_layers
        numbers = []
        for what in ("", "0", "1", str(depth), "encoder"):
            model.requires_grad_(True)
            freeze(model, model.encoder, what)
            numbers.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
            if what in ("1", str(depth)):
                layers = [any(p.requires_grad for p in layer.parameters()) for layer in model.encoder.layers()]
                assert layers == [index >= int(what) for index in range(len(layers))]
        assert numbers == sorted(numbers, reverse=True) and len(set(numbers[:4])) == 4
        assert numbers[-1] == sum(p.numel() for part in (model.head, model.fc_norm) for p in part.parameters())
        model.requires_grad_(True)
        freeze(model, model.encoder, str(depth))
        if family in ("cait", "xcit"):  # it joins behind the frozen layers
            assert model.encoder.cls_token.requires_grad
        with pytest.raises(ValueError, match=f"has {depth} layers; --freeze encoder"):
            freeze(model, model.encoder, str(depth + 1))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--freeze", "half"], "wanted encoder, or a number of layers"),
        (["--freeze", "-1"], "wanted encoder"),
        (["--init", "x", "--lora.rank", "4", "--freeze", "2"], "LoRA freezes the encoder already"),
        (["--lora.rank", "4"], "would stay random"),
        (["--init", "x", "--lora.rank", "-4"], "lora.rank=-4"),
    ],
)
def test_bad_flags(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((ValueError, SystemExit)) as error:
        config_from(["--recipe", "digits/pgd_vit_nano", *flags])
    assert message in " ".join((str(error.value) + capsys.readouterr().err).split())
