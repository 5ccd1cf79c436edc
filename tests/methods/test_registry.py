"""A method is one file: found by itself, with options and a command line of its own."""

from dataclasses import replace

import pytest
from commands import Command

from mimir_fast.methods.adv_mae import AdvMaeConfig
from mimir_fast.methods.aemim import AemimConfig
from mimir_fast.methods.mimir import MimirConfig
from mimir_fast.methods.registry import all_methods, convert, find_method
from mimir_fast.methods.simmim import SimmimConfig
from mimir_fast.models.masked_model import ModelConfig
from mimir_fast.pretrain import config_from
from mimir_fast.recipes.digits import EVERY_METHOD
from mimir_fast.training.pretraining import PretrainConfig, with_method


def test_all_methods_are_found() -> None:
    assert set(all_methods("pretrain")) >= {"mae", "noise_mae", "adv_mae", "mimir", "simmim", "aemim", "single_stage"}
    assert set(all_methods("finetune")) >= {"natural", "pgd", "fast", "apgd", "trades", "mart", "ard_prm"}


def test_an_unknown_method_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown method 'mimr'; did you mean mimir\?"):
        find_method("pretrain", "mimr")
    with pytest.raises(ValueError, match=r"did you mean trades\?"):
        find_method("finetune", "trade")


def test_options_are_carried_over_where_they_mean_the_same() -> None:
    """What was changed stays, what was not becomes the new method's default, another attack's options do not fit."""
    mimir = MimirConfig(norm_pix_loss=False)
    mimir.attack.eps = 4 / 255
    adv_mae = convert(mimir, AdvMaeConfig)
    assert type(adv_mae) is AdvMaeConfig and adv_mae.attack.eps == 4 / 255 and not adv_mae.norm_pix_loss
    aemim = convert(mimir, AemimConfig)
    assert aemim.attack.eps == 2 / 255 and not aemim.norm_pix_loss
    assert convert(mimir, SimmimConfig).mask_ratio == 0.6
    assert convert(MimirConfig(mask_ratio=0.5), SimmimConfig).mask_ratio == 0.5


def test_changing_the_method_of_a_config_changes_its_options() -> None:
    config = with_method(PretrainConfig(method="mimir"), "aemim")
    assert type(config.objective) is AemimConfig and config.model.adapters
    config = config_from(["--recipe", "digits/mimir_vit_tiny", "--method", "simmim", "--mask_unit", "8"])
    assert type(config.objective) is SimmimConfig and config.model.decoder == "linear"
    assert config.objective.mask_unit == 8
    assert config_from(["--recipe", "digits/mimir_vit_tiny", "--method", "simmim"]).objective.mask_unit is None
    assert config_from(["--recipe", "imagenet/mae_vit_base", "--method", "simmim"]).objective.mask_unit == 32


def test_simmim_needs_the_linear_decoder() -> None:
    base = config_from(["--recipe", "digits/mimir_vit_tiny"])
    with pytest.raises(ValueError, match=r"simmim needs --model.decoder linear"):
        replace(base, method="simmim")


def test_a_mask_unit_must_fit_the_patch() -> None:
    base = with_method(config_from(["--recipe", "digits/mimir_vit_tiny"]), "mae")
    with pytest.raises(ValueError, match=r"mask_unit=6 must be a multiple of the patch .4 pixels.*4, 8, 16 would do"):
        replace(base, objective=replace(base.objective, mask_unit=6))


def test_help_shows_the_method_s_options_only(command: Command) -> None:
    def help_of(method: str) -> str:
        return command("mimir_fast.pretrain", "--method", method, "--help_all").stdout

    aemim, mae = help_of("aemim"), help_of("mae")
    assert "--adversarial_weight" in aemim and "--attack.distance" in aemim and "--mi." not in aemim
    assert "--adversarial_weight" not in mae and "--attack." not in mae and "--mask_ratio" in mae


@pytest.mark.parametrize("before", EVERY_METHOD)
@pytest.mark.parametrize("after", EVERY_METHOD)
def test_another_method_gets_the_model_that_it_needs(before: str, after: str) -> None:
    """`--method mae` on a recipe of aemim kept its adapters, on one of simmim its linear decoder."""
    changed = config_from(["--recipe", f"digits/{before}_vit_nano", "--method", after])
    assert changed.model == config_from(["--recipe", f"digits/{after}_vit_nano"]).model


def test_adapters_that_nothing_trains_are_refused() -> None:
    with pytest.raises(ValueError, match="--method aemim"):
        PretrainConfig(method="mae", model=ModelConfig(adapters=True))
