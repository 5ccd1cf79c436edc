"""Whole runs as a user starts them: killed, signalled, resumed, on one process and on two."""

import json
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from commands import Command, command_environment, command_line, run_module, start_module
from zygote import Process

from mimir_fast.checkpoints.reading import checkpoints_of, read_meta, read_tensors

STEPS = 6
# 64 real digits in batches of 16: four steps an epoch, so batches, epochs and checkpoints do not coincide.
SMALL = [
    "--recipe", "digits/mimir_vit_nano", "--model.patch_size", "8", "--data.limit", "64", "--batch_size", "16",
    "--max_steps", str(STEPS), "--save_every", "2", "--log_every", "1", "--ema_decay", "0.9", "--mi.share", "0.1",
    "--mi.scope", "global", "--mi.accumulated", "--precision", "fp32",
]  # fmt: skip


def train(command: Command, folder: Path, *extra: str, ranks: int = 1) -> None:
    out = command("mimir_fast.pretrain", *SMALL, "--output_dir", str(folder), *extra, ranks=ranks)
    assert out.returncode == 0, out.stdout + out.stderr


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def final_tensors(run: Path) -> dict[str, torch.Tensor]:
    return read_tensors(checkpoints_of(run)[-1], "")


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run all others are compared with: one process, never interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(partial(run_module, folder.parent), folder)
    return folder


def test_a_run_leaves_what_a_person_wants(whole_run: Path) -> None:
    assert {p.name for p in whole_run.iterdir()} >= {
        "config.json", "environment.json", "metrics.jsonl", "curves.png", "pictures", "tensorboard", "checkpoints",
    }  # fmt: skip
    assert len(losses(whole_run)) == STEPS
    assert [p.name for p in checkpoints_of(whole_run)] == ["step-00000002", "step-00000004", "step-00000006"]
    meta = read_meta(checkpoints_of(whole_run)[-1])
    assert meta["architecture"]["encoder"] == "nano"


def wait_for(condition: Callable[[], bool], process: Process | subprocess.Popen[str], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended early with {process.poll()}"
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow  # chaos/test_chaos.py kills, damages and compares every bit of every start
def test_kill_9_and_resume_is_bit_exact(command: Command, whole_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "killed"
    process = start_module(tmp_path, "mimir_fast.pretrain", *SMALL, "--output_dir", str(run))
    wait_for(lambda: len(checkpoints_of(run)) >= 1, process)
    process.kill()
    process.wait(60)
    assert len(losses(run)) < STEPS, "the kill came too late to prove anything"
    train(command, run)
    assert losses(run) == losses(whole_run)
    wanted = final_tensors(whole_run)
    found = final_tensors(run)
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_sigterm_saves_and_exits_0(tmp_path: Path, ranks: int) -> None:
    """One process exits 0 itself; under torchrun the ranks do, and the agent reports the signal it got. That ranks stop
    after the same step, test_world.py sees."""
    run = tmp_path / "terminated"
    args = ["mimir_fast.pretrain", *SMALL, "--output_dir", str(run), "--max_steps", "500", "--save_every", "500"]
    process: Process | subprocess.Popen[str]
    if ranks == 1:
        process = start_module(tmp_path, *args)
    else:
        line = command_line(*args, ranks=ranks)
        process = subprocess.Popen(line, env=command_environment(), stdout=subprocess.DEVNULL, text=True)
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(losses(run)) >= 1, process)
    os.kill(process.pid, signal.SIGTERM)
    code = process.wait(timeout=60)
    if ranks == 1:
        assert code == 0
    saved = checkpoints_of(run)
    assert len(saved) == 1
    assert read_meta(saved[0])["step"] == int(saved[0].name.removeprefix("step-"))


# As ddp, two ranks are fine-tuned in test_finetuning.py.
@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_two_ranks_see_what_one_sees_and_hand_over_to_one(
    command: Command, whole_run: Path, tmp_path: Path, strategy: str
) -> None:
    """Two gloo processes for three steps, then one for the rest: the single-process curve, up to float order."""
    run = tmp_path / strategy
    train(command, run, "--strategy", strategy, "--stop_after", "3", ranks=2)
    assert read_meta(checkpoints_of(run)[-1])["world_size"] == 2
    train(command, run)
    torch.testing.assert_close(losses(run), losses(whole_run), rtol=1e-4, atol=1e-5)
    wanted, found = final_tensors(whole_run), final_tensors(run)
    weights = [name for name in wanted if name.startswith(("model/", "ema/"))]
    for name in weights:
        # Adam divides by √v: where a gradient is nearly zero its sign is a matter of rounding, one lr-sized step.
        assert (found[name] - wanted[name]).abs().mean() < 2e-5, name


@pytest.mark.slow  # test_free_to_change.py compares tensors with and without
def test_accumulation_sees_the_same_batches(command: Command, whole_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "accumulated"
    line = ["--accum_iter", "2", "--mi.scope", "rank", "--mi.share", "0", "--mi.weight", "0", "--max_steps", "3"]
    train(command, run, *line)
    reference = tmp_path / "plain"
    train(command, reference, *line[2:])
    torch.testing.assert_close(losses(run), losses(reference), rtol=1e-4, atol=1e-5)


def test_divergence_is_skipped_saved_and_stopped(command: Command, tmp_path: Path) -> None:
    """A learning rate of 1e30 makes the second step's loss NaN; three in a row end the run with advice."""
    run = tmp_path / "diverged"
    out = command("mimir_fast.pretrain", *SMALL, "--output_dir", str(run), "--lr", "1e30", "--max_bad_steps", "3")
    assert out.returncode == 2
    assert "tenth of the learning rate" in out.stderr
    assert len(list((run / "bad_batches").glob("*.safetensors"))) == 3


def test_full_disk_keeps_the_old_checkpoint(command: Command, tmp_path: Path) -> None:
    """The kernel refuses files over 1 MiB: saving fails as on a full disk, the older checkpoint stays whole."""
    run = tmp_path / "full"
    train(command, run, "--stop_after", "2")

    process = start_module(tmp_path, "mimir_fast.pretrain", *SMALL, "--output_dir", str(run))
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2**20, 2**20))
    assert process.wait(120) == 2
    assert "WARNING: could not write checkpoint" in process.stdout.read_text()
    assert "could not write checkpoint" in process.stderr.read_text()
    assert [p.name for p in checkpoints_of(run)] == ["step-00000002"]
    assert not list((run / "checkpoints").glob("*.partial"))
    assert read_tensors(checkpoints_of(run)[-1])


def test_another_runs_folder_and_changed_config_are_refused(command: Command, whole_run: Path) -> None:
    before = os.listdir(whole_run)
    out = command("mimir_fast.pretrain", *SMALL, "--output_dir", str(whole_run), "--attack.eps", "4/255")
    assert out.returncode == 2
    assert "objective.attack.eps: 0.03137" in out.stderr and "--allow_changes" in out.stderr
    assert os.listdir(whole_run) == before
