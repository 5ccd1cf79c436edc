"""What a run proposes to type next comes from the run, and starts as it is printed."""

import itertools
import json
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from mimir_fast.data.sources.base import ArraySource
from mimir_fast.finetune import config_from as finetune_config
from mimir_fast.methods.registry import DEFAULT
from mimir_fast.pretrain import config_from as pretrain_config
from mimir_fast.recipes import all_recipes, find_recipe
from mimir_fast.recipes.following import MODEL, after_finetuning, after_pretraining, starting_from
from mimir_fast.training.finetuning import FinetuneConfig, finetune
from mimir_fast.training.pretraining import PretrainConfig, pretrain
from mimir_fast.training.saved_run import find_saved_run

RECIPES = [recipe for recipe in all_recipes() if recipe.config_type is PretrainConfig]


def leave_config(config: Any) -> None:
    """What is there of a run's folder after training, as far as the next command looks at it."""
    config.folder.mkdir(parents=True, exist_ok=True)
    (config.folder / "config.json").write_text(json.dumps(asdict(config)))


def assert_goes_on(tuned: FinetuneConfig, config: PretrainConfig) -> None:
    """It starts from that run, with its images and its encoder."""
    assert tuned.init == str(config.folder) and tuned.method == DEFAULT["finetune"]
    assert all(getattr(tuned.model, name) == getattr(config.model, name) for name in MODEL)
    for name in ("source", "root", "image_size", "channels", "limit", "flip", "generated"):
        assert getattr(tuned.data, name) == getattr(config.data, name), name


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_of_every_recipe() -> None:
    """All are parsed as far as the parser is theirs alone: it costs 60 ms, one for each encoder is enough."""
    parsed = set()
    for recipe in RECIPES:
        config = find_recipe(PretrainConfig, recipe.name)
        leave_config(config)
        module, *args = after_pretraining(config)
        assert module == "mimir_fast.finetune"
        named = dict(itertools.pairwise(args)).get("--recipe")
        run, saved = find_saved_run(config.folder) or pytest.fail("no run")
        start = find_recipe(FinetuneConfig, named) if named else starting_from(run, saved, "pgd")
        assert_goes_on(replace(start, init=str(run)), config)
        key = (config.data.source, config.model.family, named is None)
        if key not in parsed:
            parsed.add(key)
            assert_goes_on(finetune_config(args), config)
    assert len(parsed) > 15


def test_the_recipe_for_the_same_images_and_encoder_is_proposed() -> None:
    def proposed(name: str, **run: Any) -> str:
        config = find_recipe(PretrainConfig, name)
        return shlex.join(after_pretraining(replace(config, run=replace(config.run, **run))))

    usual = "mimir_fast.finetune --recipe digits/pgd_vit_nano --init runs/digits/mimir_vit_nano"
    assert proposed("digits/mimir_vit_nano") == usual
    elsewhere = "--init 'my runs/a' --output_dir 'my runs/a-pgd'"
    assert proposed("digits/mimir_vit_nano", output_dir="my runs/a").endswith(elsewhere)
    assert proposed("digits/mae_vit_nano").endswith("--output_dir runs/digits/mae_vit_nano-pgd")  # not into MIMIR's
    assert "--recipe cifar10/pgd_vit_base_p4_800ep " in proposed("cifar10/mimir_vit_base_p4")


CUSTOM = [
    *([f"--model.patch_size={size}"] for size in (2, 4, 16)),
    *(["--model.family", family, "--model.patch_size", size] for family, size in
      (("cait", "8"), ("convit", "8"), ("xcit", "8"), ("convstem", "8"), ("swin", "2"), ("convnext", "2"))),
    ["--model.encoder", "tiny"],
    ["--model.options", "registers=2", "layer_scale"],
    ["--model.normalization", "imagenet"],
    ["--model.mean", "0.1", "0.2", "0.3", "--model.std", "0.4", "0.4", "0.4"],
    ["--data.channels", "1"],
    ["--data.flip"],
    ["--data.limit", "40"],
    ["--data.image_size", "64", "--data.augment", "resized_crop", "--data.loader", "torch", "--data.num_workers", "0"],
    ["--data.image_size", "32", "48", "--data.augment", "resized_crop", "--data.loader", "torch"],
    ["--method", "mae"],
    ["--method", "aemim"],
    ["--method", "simmim", "--mask_unit", "8"],
    ["--output_dir", "a run, with blanks & 'quotes'"],
]  # fmt: skip


@pytest.mark.parametrize("flags", CUSTOM, ids=" ".join)
def test_of_a_run_of_ones_own(flags: list[str]) -> None:
    config = pretrain_config(["--recipe", "digits/mimir_vit_nano", "--output_dir", "mine", *flags])
    leave_config(config)
    printed = shlex.join(["python", "-m", *after_pretraining(config)])
    tuned = finetune_config(shlex.split(printed)[3:])
    assert_goes_on(tuned, config)
    assert tuned.folder == Path(f"{config.folder}-pgd")
    assert after_finetuning(tuned)[2] == str(tuned.folder)


def test_told_otherwise() -> None:
    config = pretrain_config(["--data.channels", "1", "--data.limit", "40", "--output_dir", "mine"])
    leave_config(config)
    assert finetune_config(["--init", "mine", "--recipe", "digits/pgd_vit_tiny"]).model.encoder == "tiny"
    tuned = finetune_config(["--init", "mine", "--data.limit", "50", "--output_dir", "there", "--method", "trades"])
    assert (tuned.data.limit, tuned.data.channels, tuned.folder, tuned.method) == (50, 1, Path("there"), "trades")
    assert finetune_config(["--init", "mine/config.json"]).folder == Path("mine-pgd")
    Path("mine/config.json").write_text('{"data": 3}')  # of somebody else
    usual = find_recipe(FinetuneConfig, FinetuneConfig.recipe)
    assert finetune_config(["--init", "mine"]) == replace(usual, init="mine")


SMALL = [
    "--batch_size", "8", "--device", "cpu", "--precision", "fp32", "--data.limit", "16", "--max_steps", "1",
    "--attack.num_steps", "1",
]  # fmt: skip
TUNED = ["--probe.num_images", "0"]


def proposed(capsys: pytest.CaptureFixture[str], module: str) -> list[str]:
    """The flags of the command that was printed last."""
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert words[0] == "next:" and words[2:4] == ["-m", module]
    return words[4:]


def test_it_starts(capsys: pytest.CaptureFixture[str]) -> None:
    """Pre-training, then what each command prints, until the evaluation."""
    config = pretrain_config([*SMALL, "--model.patch_size", "4", "--output_dir", "a b"])
    pretrain(config, after_pretraining(config))
    tuned = finetune_config([*proposed(capsys, "mimir_fast.finetune"), *SMALL, *TUNED])
    assert_goes_on(tuned, config)
    finetune(replace(tuned, run=replace(tuned.run, dry_run=True)))
    assert "dry run: loss" in capsys.readouterr().out
    finetune(tuned, after_finetuning(tuned))
    assert proposed(capsys, "mimir_fast.evaluate")[:2] == ["--checkpoint", str(tuned.folder)]


def test_images_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pre-training on a source of one's own proposed digits."""
    from mimir_fast.data.registry import SOURCES

    with SOURCES.restored():
        SOURCES.add("mine", lambda config, split: ArraySource)  # type: ignore[arg-type,return-value]
        config = pretrain_config(["--data.source", "mine", "--data.root", "my images", "--output_dir", "mine"])
        leave_config(config)
        tuned = finetune_config(after_pretraining(config)[1:])
        assert (tuned.data.source, tuned.data.root) == ("mine", "my images")
        assert tuned.objective.attack.eps == 8 / 255 and tuned.run.epochs == 100  # the papers', not those of digits
        assert tuned.data.crop_padding == config.data.crop_padding
