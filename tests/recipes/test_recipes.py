"""Recipes build, their names resolve, and each stands beside what was published under its conditions, and no more."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from mimir_fast.methods.adv_mae import AdvMaeConfig
from mimir_fast.methods.mimir import MimirConfig
from mimir_fast.recipes import Recipe, all_recipes, find_recipe, register
from mimir_fast.recipes.__main__ import main
from mimir_fast.recipes.published import Row, all_rows
from mimir_fast.training.finetuning import FinetuneConfig
from mimir_fast.training.pretraining import PretrainConfig

RECIPES = {(recipe.command, recipe.name): recipe for recipe in all_recipes()}


def rows_of_accuracies() -> Iterator[tuple[Row, dict[str, float]]]:
    for row in all_rows():
        numbers = dict(row.numbers)
        if "natural" in numbers:
            yield row, numbers


def pretraining(name: str) -> PretrainConfig:
    return find_recipe(PretrainConfig, name)


def finetuning(name: str) -> FinetuneConfig:
    return find_recipe(FinetuneConfig, name)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda recipe: f"{recipe.command}:{recipe.name}")
def test_every_recipe_is_what_its_name_says(recipe: Recipe) -> None:
    config = find_recipe(recipe.config_type, recipe.name)
    assert isinstance(config, recipe.config_type) and config.recipe == recipe.name
    data, _, rest = recipe.name.partition("/")
    assert config.data.source == data
    assert rest.startswith(f"{config.method}_{config.model.family}_{config.model.encoder}")


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean cifar10/mimir_vit_base_official"):
        pretraining("cifar/mimir_vit_base_oficial")
    with pytest.raises(ValueError, match="did you mean cifar10/pgd_vit_base"):
        finetuning("cifar/pgd_vit_base")


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="registered twice"):
        register("cifar10/mimir_vit_tiny", PretrainConfig, PretrainConfig, "")


class TestPublished:
    def test_every_row_names_recipes_that_exist_or_says_why_not(self) -> None:
        for row in all_rows():
            assert row.table and row.system
            for command in ("pretrain", "finetune"):
                name = getattr(row, command)
                assert not name or (command, name) in RECIPES, f"{row.table}, {row.system}: no {command} recipe {name}"
            assert bool(row.why_not) != bool(row.pretrain or row.finetune), f"{row.table}, {row.system}"

    def test_a_row_without_recipe_or_reason_is_refused(self) -> None:
        with pytest.raises(ValueError, match="say why there are none"):
            Row("Table 1", "ViT-S", (("natural", 70.0),))

    def test_every_number_has_its_source_and_adversary(self) -> None:
        published = [recipe for recipe in RECIPES.values() if any(row.numbers for row in recipe.expected)]
        assert len(published) > 60
        for row, numbers in rows_of_accuracies():
            assert all(0 < value < 100 for value in numbers.values())
            robust = [value for what, value in numbers.items() if what != "natural"]
            assert bool(robust) <= ("eps" in row.adversary), row.system
            assert all(value < numbers["natural"] for value in robust), row.system

    def test_the_pair_of_a_row_fits(self) -> None:
        """Fine-tuning starts from its pre-training: same data, same encoder."""
        for row in all_rows():
            if row.pretrain and row.finetune:
                before, after = pretraining(row.pretrain), finetuning(row.finetune)
                assert before.data.source == after.data.source and before.data.image_size == after.data.image_size
                for what in ("family", "encoder", "patch_size"):
                    assert getattr(before.model, what) == getattr(after.model, what), row.system

    def test_the_papers_words_have_no_numbers(self) -> None:
        """MIMIR's and adv-MAE's belong to the authors' code: nHSIC, an own mask, the adversarial target."""
        for recipe in RECIPES.values():
            if recipe.command == "pretrain" and recipe.expected and not recipe.name.startswith("digits"):
                objective = pretraining(recipe.name).objective
                if isinstance(objective, AdvMaeConfig):
                    assert objective.attack.mask == "fresh" and objective.attack.target == "adversarial", recipe.name
                if isinstance(objective, MimirConfig):
                    assert objective.mi.estimator in ("nhsic", "renyi"), recipe.name
        assert "the authors' code (nHSIC)" in RECIPES["pretrain", "cifar10/mimir_vit_tiny"].caveat

    def test_an_adversary_of_training_has_the_radius_it_is_judged_at(self) -> None:
        for row, numbers in rows_of_accuracies():
            if row.finetune and len(numbers) > 1:
                eps = 255 * finetuning(row.finetune).objective.attack.eps
                assert row.adversary.startswith(f"eps {eps:.0f}/255"), row.system


class TestConditions:
    """Where recipes once stood beside numbers they would not reach."""

    def test_the_ablation(self) -> None:
        """50 epochs of PGD-10 at blr 5e-4 (text a, Tables 1 and 7)."""
        rows = [row for row in all_rows() if "Table 7, b Tables 4, 5" in row.table]
        assert len(rows) == 9 and len({row.finetune for row in rows}) == 1
        config = finetuning(rows[0].finetune)
        assert (config.run.epochs, config.optim.blr, config.objective.attack.num_steps) == (50, 5e-4, 10)
        weights = {pretraining(row.pretrain).objective.mi.weight for row in rows if "MIMIR" in row.system}  # type: ignore[attr-defined]
        assert weights == {1e-3, 1e-5, 1e-6}

    @pytest.mark.parametrize("base", ["cifar10/adv_mae_vit_tiny", "cifar10/adv_mae_vit_tiny_official"])
    def test_ten_attack_steps_are_of_two_grey_levels(self, base: str) -> None:
        attack = pretraining(f"{base}_10step").objective.attack  # type: ignore[attr-defined]
        assert attack == replace(pretraining(base).objective.attack, num_steps=10, alpha=2 / 255)  # type: ignore[attr-defined]

    def test_tiny_imagenet_is_with_generated_images(self) -> None:
        rows = [row for row, numbers in rows_of_accuracies() if row.finetune.startswith("tiny_imagenet/pgd")]
        assert len(rows) == 4 and all(finetuning(row.finetune).data.generated for row in rows)

    def test_long_imagenet_runs_have_weak_augmentation_and_are_judged_by_autoattack(self) -> None:
        rows = [row for row, _ in rows_of_accuracies() if row.finetune.startswith("imagenet/apgd")]
        assert len(rows) >= 6
        for row in rows:
            objective = finetuning(row.finetune).objective
            assert not objective.mixing.enabled and not objective.randaugment.enabled
            assert [what for what, _ in row.numbers] == ["natural", "AA"]

    def test_ard_prm_falls_in_steps_and_clips(self) -> None:
        config = finetuning("cifar10/ard_prm_vit_small")
        assert config.optim.lr_drops == (0.875, 0.95) and config.run.clip_grad == 1.0 and config.run.batch_size == 64

    def test_ard_prm_around_trades_and_mart(self) -> None:
        """β is 6 in Mo et al.'s code, which mixes images in plain adversarial training only."""
        for loss in ("trades", "mart"):
            objective: Any = finetuning(f"cifar10/ard_prm_vit_tiny_{loss}").objective
            assert objective.ard_prm.loss == loss and getattr(objective, loss).beta == 6
            assert not objective.mixing.enabled
        assert finetuning("cifar10/ard_prm_vit_tiny").objective.mixing.prob == 0.3

    def test_batch_norms_are_attacked_as_in_the_authors_code(self) -> None:
        """torchattacks' PGD, which MIMIR's finetune.py calls, puts the model in eval mode."""
        modes = {"imagenet/fast_xcit_small": "eval", "imagenet/pgd_xcit_small": "eval", "digits/pgd_xcit_nano": "auto"}
        assert {name: finetuning(name).objective.attack_mode for name in modes} == modes

    def test_agat_is_as_far_as_known(self) -> None:
        """Pooling, normalisation and dropping as reported of its code; that the rest is not, the list says."""
        for ending in ("", "_eps2"):
            for name in ("agat", "scratch_300ep"):
                recipe = RECIPES["finetune", f"imagenet/fast_vit_small_{name}{ending}"]
                model = recipe.build().model
                assert (model.global_pool, model.normalization) == ("cls", "imagenet")
                assert model.token_drop == ("always" if name == "agat" else "training")
                assert "AGAT's code not at hand" in recipe.caveat

    def test_simmim(self) -> None:
        config = pretraining("imagenet/simmim_vit_base")
        rate = [config.optim.lr_at(e, batch_size=2048, total_steps=800, warmup_steps=10) for e in (10, 699, 700)]
        assert rate == pytest.approx([4e-4, 4e-4, 4e-5])  # 1e-4 for 512 images
        assert config.run.clip_grad == 5.0 and config.optim.betas == (0.9, 0.999)
        assert pretraining("imagenet/aemim_vit_base_simmim").objective.mask_unit == 32

    def test_cifar10_rows_of_text_a_ask_for_the_generated_images(self) -> None:
        """§4.2: EDM images were applied to experiments with CIFAR-10; only other papers' and mere times are without."""
        rows = [row for row in all_rows() if "MIMIR-a" in row.table and row.system.startswith("CIFAR-10")]
        for row in rows:
            ours = "ImageNet-1K →" not in row.system and any(what.startswith("PGD") for what, _ in row.numbers)
            assert ("EDM" in row.unresolved) == ours, row.system

    def test_a_table_is_whole(self) -> None:
        table = [row.system.split()[1] for row in all_rows() if row.table == "MIMIR-a Table 4"]
        assert table == [f"{name}," for name in ("ViT-S", "ConViT-S", "XCiT-S", "XCiT-M") for _ in range(2)]

    def test_contradictions_are_said(self) -> None:
        said = {row.table for row in all_rows() if row.unresolved}
        assert {"MIMIR-a Table 2", "MIMIR-a Table 3", "MIMIR-a Table 9, b Table 6", "MIMIR-b Table 3"} <= said


def test_a_variant_differs_from_its_base_in_what_it_names() -> None:
    base = pretraining("cifar10/mimir_vit_tiny")
    variant = pretraining("cifar10/mimir_vit_tiny_renyi_1e-3")
    mi = replace(base.objective.mi, estimator="renyi", alpha=1.01, weight=1e-3)  # type: ignore[attr-defined]
    assert variant == replace(base, recipe=variant.recipe, objective=replace(base.objective, mi=mi))  # type: ignore[call-arg]


def test_the_list_fits_a_hundred_columns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    main(["list", "all"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    first = {line.split()[0] for line in lines if line.strip()}
    assert {recipe.name for recipe in RECIPES.values()} <= first, "a name is cut short"


def test_the_list_can_be_narrowed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["list", "swin_base"])
    out = capsys.readouterr().out
    assert "imagenet/mimir_swin_base_official" in out and "55.90 AA" in out and "vit_tiny" not in out
