"""A preset means one thing, whether a recipe or the command line asks for it."""

from dataclasses import replace

import pytest
import torch

from mimir_fast.methods.mimir import MimirConfig
from mimir_fast.pretrain import config_from
from mimir_fast.recipes import all_recipes, find_recipe
from mimir_fast.training.precision import choose_precision
from mimir_fast.training.pretraining import PretrainConfig

OFFICIAL = [
    recipe.name for recipe in all_recipes() if recipe.command == "pretrain" and recipe.name.endswith("_official")
]
# One of each family, and MAE, which has the family's point only: parsing takes time, and sizes do not matter.
KINDS = {
    find_recipe(PretrainConfig, name).model.family: name for name in OFFICIAL if "/mimir" in name
} | {"mae": "imagenet/mae_convit_small_official"}  # fmt: skip


def by_flag(name: str, preset: str) -> PretrainConfig:
    return config_from(["--recipe", name, "--preset", preset])


def test_every_family_of_the_authors_has_an_official_recipe() -> None:
    assert set(KINDS) == {"vit", "convit", "cait", "xcit", "convstem", "swin", "mae"}


@pytest.mark.parametrize("name", KINDS.values())
def test_the_flag_is_the_recipe(name: str) -> None:
    recipe, flag = find_recipe(PretrainConfig, name), by_flag(name.removesuffix("_official"), "official")
    assert flag == replace(recipe, recipe=flag.recipe)
    cuda = torch.device("cuda")
    precisions = {choose_precision("auto", cuda, parity=c.exact, recorded=None).name for c in (recipe, flag)}
    assert precisions == {"fp32"}


@pytest.mark.parametrize("name", [KINDS["vit"], KINDS["xcit"]])
def test_the_papers_words_take_it_all_back(name: str) -> None:
    """But for the images that a rank works on at once, of which the paper says nothing. The plain recipe has them."""
    paper, base = by_flag(name, "paper"), by_flag(name.removesuffix("_official"), "paper")
    run = replace(base.run, micro_batch=paper.run.micro_batch)
    assert paper == replace(base, recipe=paper.recipe, run=run)
    assert base == find_recipe(PretrainConfig, base.recipe)


@pytest.mark.parametrize(("data", "images"), [("cifar10", 128), ("imagenet", 512), ("tiny_imagenet", None)])
def test_the_penalty_is_estimated_on_as_many_images_as_the_authors_did(data: str, images: int | None) -> None:
    """script/train_cifar10.sh and train_imagenet.sh of their code: so many on each of four GPUs."""
    config = find_recipe(PretrainConfig, f"{data}/mimir_vit_small_official")
    assert config.run.micro_batch == images
    if images is not None:
        ranks = {1: 4, 4: 1}
        assert {size: config.run.accumulation(size) for size in ranks} == ranks


def test_another_method_keeps_the_preset_where_it_has_its_points() -> None:
    official = ["--recipe", "imagenet/mae_convit_small_official", "--method"]
    mimir = config_from([*official, "mimir"])
    assert isinstance(mimir.objective, MimirConfig) and mimir.objective.mi.estimator == "nhsic"
    assert mimir.preset == "official" and mimir.model.positions == "official"
    assert not config_from([*official, "noise_mae"]).preset


def test_a_preset_without_a_point_is_refused() -> None:
    with pytest.raises(ValueError, match="mimir and adv_mae"):
        by_flag("imagenet/mae_vit_small", "official")
