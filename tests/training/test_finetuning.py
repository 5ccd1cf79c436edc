"""Fine-tuning runs: from a pre-trained encoder to a classifier, resumed, on two ranks, and with bad input."""

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Command
from file_state import file_state
from PIL import Image

from mimir_fast.checkpoints.reading import checkpoints_of, read_meta, read_tensors
from mimir_fast.checkpoints.saving import save_checkpoint
from mimir_fast.data.sources import ArraySource
from mimir_fast.finetune import config_from
from mimir_fast.methods.probe import ProbeResult
from mimir_fast.methods.registry import find_method
from mimir_fast.models.classifier import load_classifier
from mimir_fast.models.masked_model import ModelConfig, build_masked_model
from mimir_fast.models.weight_files import WeightsError
from mimir_fast.training import finetuning
from mimir_fast.training.finetuning import FinetuneConfig, finetune

STEPS = 6
# 64 digits in batches of 16, patches of 16 pixels; everything random is switched on.
SMALL = [
    "--recipe", "digits/pgd_vit_nano", "--data.limit", "64", "--model.patch_size", "16", "--model.drop_path", "0.2",
    "--batch_size", "16", "--max_steps", str(STEPS), "--log_every", "1", "--save_every", "2", "--attack.num_steps", "1",
    "--attack.eps", "24/255", "--randaugment.num_ops", "2", "--mixing.mixup", "0.8", "--mixing.cutmix", "1",
    "--label_smoothing", "0.1", "--ema_decay", "0.9", "--probe.num_images", "16", "--probe.num_steps", "1",
    "--device", "cpu", "--precision", "fp32",
]  # fmt: skip
Lines = list[dict[str, float]]


def small(folder: Path, *extra: str) -> FinetuneConfig:
    return config_from([*SMALL, "--output_dir", str(folder), *extra])


def metrics(run: Path) -> Lines:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run) if "loss" in line]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a pre-training run leaves."""
    torch.manual_seed(0)
    model = build_masked_model(ModelConfig(encoder="nano", patch_size=16), image_size=32)
    run = tmp_path_factory.mktemp("pretrained") / "mimir"
    tensors = {f"model/{n}": t.detach() for n, t in file_state(model).items()}
    save_checkpoint(run / "checkpoints" / "step-00000009", tensors, {"step": 9, "kind": "pretrain", "config": {}})
    return run


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory, pretrained: Path) -> Path:
    """The run others are compared with: one process, never interrupted."""
    return finetune(small(tmp_path_factory.mktemp("whole") / "run", "--init", str(pretrained)))


def test_a_run_probes_and_keeps_best_and_last(whole_run: Path) -> None:
    probes = [line for line in metrics(whole_run) if "pgd" in line]
    assert len(probes) == 2  # after the epoch of four steps, and at the end
    assert all(0 <= line[name] <= 1 for line in probes for name in ("natural", "fgsm", "pgd", "score"))
    assert [line["step"] for line in metrics(whole_run)] == list(range(STEPS)), "one line a step"
    said = (whole_run / "log.txt").read_text()
    assert f"step {STEPS}/{STEPS}  loss " in said and "natural" in said and f"done: {STEPS} steps" in said
    names = {p.name for p in (whole_run / "checkpoints").iterdir()}
    assert {"best", f"step-{STEPS:08d}"} <= names
    assert read_meta(whole_run / "checkpoints" / "best")["best_score"] == max(line["score"] for line in probes)
    assert list((whole_run / "pictures").glob("attack-*.png")) and (whole_run / "curves.png").exists()


def test_a_split_too_small_for_a_probe_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split, label, number in itertools.product(("train", "val"), "ab", range(4)):
        (tmp_path / split / label).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (40 * number, 0, 0)).save(tmp_path / split / label / f"{number}.png")
    data = ("--data.source", "folder", "--data.root", str(tmp_path), "--batch_size", "8", "--max_steps", "1")
    run = finetune(small(tmp_path / "run", *data))
    assert "no probe and no best checkpoint: the training split is too small" in capsys.readouterr().out
    assert not (run / "checkpoints" / "best").exists()


def test_the_result_is_a_classifier(whole_run: Path) -> None:
    model = load_classifier(whole_run, num_classes=10)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert model.config.drop_path == 0.2


def test_interrupted_and_resumed_is_bit_exact(whole_run: Path, pretrained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = small(run, "--init", str(pretrained))
    finetune(replace(config, run=replace(config.run, stop_after=3)))
    assert len(losses(run)) == 3
    finetune(config)
    assert losses(run) == losses(whole_run)
    wanted, found = (read_tensors(checkpoints_of(r)[-1], "") for r in (whole_run, run))
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[n], found[n]) for n in wanted)


def test_a_kill_before_the_best_one_got_its_name(pretrained: Path, tmp_path: Path) -> None:
    """The checkpoint itself says which one is best: what a kill left undone is done at the next start."""
    run = tmp_path / "run"
    config = small(run, "--init", str(pretrained))
    finetune(replace(config, run=replace(config.run, stop_after=5)))
    best, score = run / "checkpoints" / "best", read_meta(checkpoints_of(run)[-1])["best_score"]
    name = best.readlink()
    best.unlink()
    best.symlink_to("step-00000002")  # as it was before, say
    finetune(replace(config, run=replace(config.run, stop_after=1)))
    meta = read_meta(checkpoints_of(run)[-1])
    assert meta["step"] == STEPS and meta["best_score"] >= score
    assert best.readlink() == (name if meta["best_score"] == score else Path(f"step-{STEPS:08d}"))


def test_two_ranks_see_what_one_sees(whole_run: Path, pretrained: Path, tmp_path: Path, command: Command) -> None:
    run = tmp_path / "two"
    out = command("mimir_fast.finetune", *SMALL, "--output_dir", str(run), "--init", str(pretrained), ranks=2)
    assert out.returncode == 0, out.stdout + out.stderr
    np.testing.assert_allclose(losses(run), losses(whole_run), rtol=2e-4)
    assert "initialised from" in out.stdout and re.search(r"loaded +52 tensors", out.stdout), out.stdout
    assert f"python -m mimir_fast.evaluate --checkpoint {run} --suite quick --eps 24/255" in out.stdout


def test_an_overfitted_run_is_said_loudly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(finetuning, "probe", lambda *args, **kwargs: ProbeResult(0.9, 0.85, 0.02, 16))
    finetune(replace(small(tmp_path / "run", "--max_steps", "1"), method="fast"))
    assert "WARNING: CATASTROPHIC OVERFITTING: FGSM accuracy 85.0% but PGD accuracy 2.0%" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["natural", "pgd", "fast", "apgd", "trades", "mart", "ard_prm"])
def test_every_method_is_built_from_its_recipe(method: str) -> None:
    config = config_from(["--recipe", f"digits/{method}_vit_nano"])
    assert config.recipe == f"digits/{method}_vit_nano" and config.method == method
    find_method("finetune", config.method).build(config.objective)


class TestBadInput:
    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--attack.eps", "8"], "8/255"),
            (["--model.patch_size", "5"], "patch sizes that fit"),
            (["--method", "trade"], "trades"),
            (["--mixing.mixup", "-1"], "Beta parameter"),
            (["--method", "mart", "--mixing.mixup", "0.8"], "hard labels"),
        ],
    )
    def test_flags(self, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises((ValueError, SystemExit)) as error:
            config_from(["--recipe", "digits/pgd_vit_nano", *flags])
        assert message in str(error.value) + capsys.readouterr().err

    def test_unknown_recipe(self) -> None:
        with pytest.raises(ValueError, match="did you mean cifar10/pgd_vit_base"):
            config_from(["--recipe", "cifar/pgd_vit_base"])

    def test_init_of_another_architecture(self, pretrained: Path, tmp_path: Path) -> None:
        with pytest.raises(WeightsError, match=r"--model\.encoder nano"):
            finetune(small(tmp_path / "run", "--init", str(pretrained), "--model.encoder", "small"))

    @pytest.mark.parametrize(
        ("classes", "label", "message"),
        [({"train": "abc", "test": "ab"}, 0, "3 classes in its training split and 2"), ({}, -1, "without labels")],
    )
    def test_data_that_cannot_be_learned(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classes: dict[str, str], label: int, message: str
    ) -> None:
        def source(config: object, split: str) -> ArraySource:
            images = np.zeros((4, 3, 32, 32), np.uint8)
            return ArraySource("made", images, np.full(4, label), classes.get(split, "ab"))

        patched: Callable[..., ArraySource] = source
        monkeypatch.setattr(finetuning, "build_source", patched)
        with pytest.raises(ValueError, match=message):
            finetune(small(tmp_path / "run"))
