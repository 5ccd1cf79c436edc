"""Options from files: what they become, that flags win, and that a run's own config.json makes the same run again."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mimir_fast import evaluate, finetune, pretrain, probe
from mimir_fast.config_file import read_options, with_config_files, words_of
from mimir_fast.recipes import find_recipe
from mimir_fast.training.finetuning import FinetuneConfig
from mimir_fast.training.pretraining import PretrainConfig

YAML = """
recipe: digits/mae_vit_nano
batch_size: 64
data: {limit: 100, flip: true, crop_scale: [0.5, 1]}
model.patch_size: 4
run:
  clip_grad: 1e-2      # YAML takes this for text
"""
TOML = """
recipe = "digits/mae_vit_nano"
batch_size = 64
model.patch_size = 4
[data]
limit = 100
flip = true
crop_scale = [0.5, 1.0]
[run]
clip_grad = "1/100"
"""


@pytest.mark.parametrize(("name", "text"), [("a.yaml", YAML), ("a.YML", YAML), ("a.toml", TOML)])
def test_files_by_hand(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    config = pretrain.config_from(["--data.limit", "50", "--config", str(tmp_path / name), "--max_steps=3"])
    base = find_recipe(PretrainConfig, "digits/mae_vit_nano")
    assert config.method == "mae" and config.model == replace(base.model, patch_size=4)
    assert config.data == replace(base.data, limit=50, flip=True, crop_scale=(0.5, 1.0))  # what is typed wins
    assert config.run == replace(base.run, batch_size=64, max_steps=3, clip_grad=0.01)


PRETRAINING = [
    "digits/mimir_vit_nano", "cifar10/mimir_vit_base_official", "imagenet/aemim_vit_base_800ep",
    "imagenet/mimir_xcit_small_official", "digits/single_stage_vit_nano",
]  # fmt: skip
FINETUNING = ["cifar10/pgd_vit_base_p4_800ep_mix_randaugment", "cifar10/ard_prm_vit_base", "digits/free_vit_nano"]


@pytest.mark.parametrize("recipe", PRETRAINING)
def test_a_run_again(recipe: str, tmp_path: Path) -> None:
    wanted = pretrain.config_from(["--recipe", recipe, "--data.image_size", "48", "32", "--output_dir", "there"])
    wanted = replace(wanted, init="a file.pth", init_image_size=(224, 96))
    derived = {"format": "mimir_fast.run", "derived": {"penalty_images": 4}}
    (tmp_path / "config.json").write_text(json.dumps(derived | asdict(wanted)))
    for path in (tmp_path, tmp_path / "config.json"):
        assert pretrain.config_from(["--config", str(path)]) == wanted
    assert pretrain.config_from([f"--config={tmp_path}", "--seed", "3"]) == replace(
        wanted, run=replace(wanted.run, seed=3)
    )


@pytest.mark.parametrize(
    "recipe", ["cifar10/pgd_vit_base_p4_800ep_mix_randaugment", "cifar10/ard_prm_vit_base", "digits/free_vit_nano"]
)
def test_a_fine_tuning_again(recipe: str, tmp_path: Path) -> None:
    wanted = finetune.config_from(["--recipe", recipe, "--model.options", "registers=2", "qk_norm"])
    (tmp_path / "config.json").write_text(json.dumps(asdict(wanted)))
    assert finetune.config_from(["--config", str(tmp_path)]) == wanted
    assert isinstance(wanted, FinetuneConfig)


def test_every_command(tmp_path: Path) -> None:
    path = tmp_path / "judge.yaml"
    path.write_text("checkpoint: runs/a\neps: 4/255\nmean: [0.1, 0.2, 0.3]\nstd: [1, 1, 1]\n")
    judged, probed = (command.config_from(["--config", str(path)]) for command in (evaluate, probe))
    assert judged.checkpoint == probed.checkpoint == "runs/a" and judged.eps == probed.eps == 4 / 255
    assert judged.mean == (0.1, 0.2, 0.3)


def test_words() -> None:
    options = {"method": "mae", "run": {"resume": False}, "data": {"root": None, "flip": True}, "imports": ["a", "b"],
               "attack": {"eps": 0.1}, "init": "", "lr_drops": [], "seed": -1}  # fmt: skip
    assert words_of(options) == [
        "--method", "mae", "--no_resume", "--data.root=None", "--data.flip", "--import", "a", "--import", "b",
        "--attack.eps", "0.1", "--init=", "--lr_drops", "--seed=-1",
    ]  # fmt: skip
    assert words_of({"imports": "one"}) == ["--import", "one"]


def test_what_is_no_file_of_options(tmp_path: Path) -> None:
    for name, text, words in (
        ("a.json", "{", "Expecting property name"), ("a.ini", "", "ends in .yaml, .toml or .json"),
        ("a.yaml", "- 1", "wanted names of options"), ("b.yaml", "1: 2", "wanted names"),
    ):  # fmt: skip
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=words):
            read_options(tmp_path / name)
    with pytest.raises(ValueError, match="--config wants a file"):
        with_config_files(["--config"])


def test_no_module_that_came_with_a_run_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    run = tmp_path / "came_with_it" / "run"
    run.mkdir(parents=True)
    (run.parent / "__init__.py").write_text("raise SystemExit('code of a stranger')")
    config = {"format": "mimir_fast.run", "imports": ["came_with_it"], "seed": 3}
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(ImportError, match="which came with it: --import came_with_it if you trust it"):
        pretrain.config_from(["--config", str(run)])
    (run / "config.json").write_text(json.dumps(config | {"imports": []}))
    assert pretrain.config_from(["--config", str(run)]).run.seed == 3


def test_an_option_that_waits_is_taken_from_a_file_and_refused_where_it_is_typed(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("mi: {sigma: 3, estimator: none}")
    assert pretrain.config_from(["--config", str(tmp_path / "a.yaml")]).objective.mi.sigma == 3
    with pytest.raises(ValueError, match=r"--mi\.sigma does nothing"):
        pretrain.config_from(["--config", str(tmp_path / "a.yaml"), "--mi.sigma", "4"])
