"""The parts of the loop, one by one."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import masked_vit

from mimir_fast.cli import parse_float
from mimir_fast.models.file_names import parameters_by_file_name
from mimir_fast.models.masked_model import MaskedModel, ModelConfig, build_masked_model
from mimir_fast.pretrain import config_from
from mimir_fast.recipes import find_recipe
from mimir_fast.training.ema import Ema
from mimir_fast.training.loop import RunConfig
from mimir_fast.training.optimizer import (
    OptimizerConfig,
    build_optimizer,
    cosine_schedule,
    parameter_groups,
    stepped_schedule,
)
from mimir_fast.training.pictures import grid, save_curves
from mimir_fast.training.pretraining import PretrainConfig


@pytest.fixture
def model() -> MaskedModel:
    torch.manual_seed(0)
    return masked_vit(16, 4, 3, 32, 2, 2, 16, 1, 2)


class TestSchedule:
    def test_warms_up_then_falls_to_the_minimum(self) -> None:
        def lr(step: int) -> float:
            return cosine_schedule(step, total_steps=100, warmup_steps=10, peak=1.0, minimum=0.1)

        assert lr(0) == pytest.approx(0.1) and lr(9) == 1.0 and lr(10) == 1.0
        assert lr(55) == pytest.approx(0.55)
        assert lr(100) == pytest.approx(0.1)

    @given(st.integers(0, 200), st.integers(1, 150), st.integers(0, 50))
    def test_never_leaves_its_range(self, step: int, total: int, warmup: int) -> None:
        assert 0 <= cosine_schedule(step, total_steps=total, warmup_steps=warmup, peak=1.0) <= 1

    def test_falls_to_a_tenth_at_each_drop(self) -> None:
        """SimMIM's 800 epochs, ×0.1 at 700, in units of epochs; and Mo et al.'s 40, with two drops."""

        def lr(step: int) -> float:
            return stepped_schedule(step, total_steps=800, warmup_steps=10, peak=1e-4, drops=(0.875,))

        assert lr(0) == pytest.approx(1e-5) and lr(9) == lr(10) == lr(699) == 1e-4
        assert lr(700) == lr(799) == pytest.approx(1e-5)
        config = OptimizerConfig(optimizer="sgd", lr=0.1, lr_drops=(0.875, 0.95))
        epochs = [config.lr_at(step, batch_size=64, total_steps=40, warmup_steps=0) for step in range(40)]
        assert epochs == pytest.approx([0.1] * 35 + [0.01] * 3 + [0.001] * 2)

    def test_refuses_epochs_for_parts_of_the_run(self) -> None:
        with pytest.raises(ValueError, match="parts of the run between 0 and 1"):
            OptimizerConfig(lr_drops=(700.0,))

    def test_a_shorter_run_keeps_the_fraction_of_warmup(self) -> None:
        assert RunConfig(epochs=800, warmup_epochs=40, batch_size=100).warmup_steps(1000) == 400
        assert RunConfig(epochs=800, warmup_epochs=40, batch_size=100, max_steps=200).warmup_steps(1000) == 10


class TestOptimizer:
    def test_groups_hold_every_trainable_parameter_once(self, model: MaskedModel) -> None:
        groups = parameter_groups(model, 0.05, 0.75)
        ids = [id(p) for group in groups for p in group["params"]]
        assert len(ids) == len(set(ids)) == sum(p.requires_grad for p in model.parameters())

    def test_only_matrices_decay(self, model: MaskedModel) -> None:
        undecayed = {id(p) for g in parameter_groups(model, 0.05, 1.0) if not g["weight_decay"] for p in g["params"]}
        named = dict(parameters_by_file_name(model))
        assert id(named["cls_token"]) in undecayed and id(named["blocks.0.norm1.weight"]) in undecayed
        assert id(named["blocks.0.attn.qkv.weight"]) not in undecayed

    @pytest.mark.parametrize("asked", [False, True])
    def test_tables_of_relative_positions_decay_where_asked(self, asked: bool) -> None:
        """Swin's authors spare them; the MIMIR authors' pre-training, whose recipes ask, does not."""
        model = build_masked_model(ModelConfig(family="swin", encoder="nano", patch_size=2), 32)
        optimizer = build_optimizer(model, OptimizerConfig(decay_position_bias=asked))
        decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        tables = [id(p) for n, p in parameters_by_file_name(model) if n.endswith("relative_position_bias_table")]
        assert tables and {decay[table] for table in tables} == {0.05 if asked else 0.0}
        kinds = {"imagenet/mimir_swin_base_official": True, "digits/mimir_swin_nano": False}
        assert {n: find_recipe(PretrainConfig, n).optim.decay_position_bias for n in kinds} == kinds

    def test_layer_decay_shrinks_towards_the_input(self, model: MaskedModel) -> None:
        scale = {id(p): g["lr_scale"] for g in parameter_groups(model, 0.05, 0.5) for p in g["params"]}
        named = dict(parameters_by_file_name(model))
        names = ["patch_embed.proj.weight", "blocks.0.mlp.fc1.bias", "blocks.1.mlp.fc1.bias", "norm.bias"]
        assert [scale[id(named[name])] for name in names] == [0.125, 0.25, 0.5, 1.0]

    def test_adamw_is_fused_and_skips_on_the_device(self, model: MaskedModel) -> None:
        optimizer = build_optimizer(model, OptimizerConfig())
        assert optimizer.defaults["fused"]

    def test_the_wrong_apex_is_not_believed(self, model: MaskedModel) -> None:
        try:
            import apex.optimizers  # noqa: F401
        except ImportError:
            with pytest.raises(ImportError, match="build it from NVIDIA's source"):
                build_optimizer(model, OptimizerConfig(optimizer="apex_adam"))
        else:
            build_optimizer(model, OptimizerConfig(optimizer="apex_adam"))


def test_ema_moves_and_swaps_back(model: MaskedModel) -> None:
    ema = Ema(model, 0.9)
    before = model.encoder.norm.weight.detach().clone()
    with torch.no_grad():
        model.encoder.norm.weight += 1
    ema.update()
    torch.testing.assert_close(ema.average["norm.weight"], before + 0.1)
    with ema.swapped():
        torch.testing.assert_close(model.encoder.norm.weight.detach(), before + 0.1)
    torch.testing.assert_close(model.encoder.norm.weight.detach(), before + 1)


class TestCommandLine:
    def test_familiar_flags_of_mae_are_accepted(self) -> None:
        config = config_from(
            ["--blr", "1e-3", "--mask_ratio", "0.6", "--accum_iter", "4", "--no_norm_pix_loss", "--batch_size", "64"]
        )
        assert (config.optim.blr, config.objective.mask_ratio, config.run.accum_iter) == (1e-3, 0.6, 4)
        assert not config.objective.norm_pix_loss

    def test_fractions(self) -> None:
        assert parse_float("8/255") == 8 / 255
        assert config_from(["--attack.eps", "4/255"]).objective.attack.eps == 4 / 255

    def test_presets_differ_as_the_paper_and_the_code_do(self) -> None:
        official = config_from(["--preset", "official"]).objective
        assert (official.attack.mask, official.attack.target, official.mi.estimator) == (
            "fresh",
            "adversarial",
            "nhsic",
        )
        paper = config_from(["--preset", "paper"]).objective
        assert (paper.attack.mask, paper.attack.target, paper.mi.estimator) == ("shared", "clean", "hsic")

    def test_a_flag_beats_the_preset(self) -> None:
        assert config_from(["--preset", "official", "--attack.mask", "shared"]).objective.attack.mask == "shared"

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["--attack.eps", "8"], "8/255"),
            (["--data.image_size", "30"], "not divisible by patch size 8"),
            (["--mask_ratio", "0.999"], "leaves 0 of 16 patches visible"),
            (["--batch_size", "0"], "wanted at least 1"),
        ],
        ids=lambda value: "" if isinstance(value, list) else value,
    )
    def test_bad_values_name_the_fix(self, args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises((SystemExit, ValueError)) as caught:
            config_from(args)
        out = capsys.readouterr()
        said = " ".join((out.out + out.err + str(caught.value)).replace("│", " ").split())
        assert message in said

    def test_an_unknown_recipe_suggests_the_nearest(self) -> None:
        with pytest.raises(ValueError, match=r"did you mean digits/mimir_vit_tiny\?"):
            config_from(["--recipe", "digit/mimir_tiny"])


def test_pictures(tmp_path: Path) -> None:
    rows = {"input": torch.rand(3, 3, 8, 8), "visible": torch.rand(3, 3, 8, 8)}
    captioned = grid(rows, {"input": ["3", "3, not 8", ""]})
    picture = grid(rows)
    assert captioned.shape == (picture.shape[0] + 18, *picture.shape[1:])
    strip = captioned[4 + 96 : 4 + 96 + 18, 118:]
    assert (strip[:, :196] < 128).any() and (strip[:, 200:] == 255).all(), "words under two of three images"
    assert picture.ndim == 3 and picture.std() > 0
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps({"step": s, "loss": 1 / (s + 1)}) + "\n" for s in range(5)))
    assert save_curves(metrics, tmp_path / "curves.png", ("loss", "mi"))
    assert (tmp_path / "curves.png").stat().st_size > 1000
