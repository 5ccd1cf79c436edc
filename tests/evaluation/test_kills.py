"""Twenty kills at random moments, ten thousand images: the numbers are those of one undisturbed start."""

import random
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import command_environment, command_line, run_module
from small_classifier import train_small

from mimir_fast.data import DataConfig, build_source
from mimir_fast.evaluation.results import Results

KILLS, IMAGES = 20, 10_000


def write_idx(path: Path, array: np.ndarray) -> None:
    """MNIST's own format."""
    head = bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    path.write_bytes(head + array.tobytes())


@pytest.fixture
def many_digits(tmp_path: Path) -> Path:
    """Ten thousand noisy copies of the digits at 8 × 8, as idx files."""
    source = build_source(DataConfig(source="digits", image_size=8, channels=1), "train")
    draws = np.random.default_rng(0)
    rows = draws.integers(0, len(source), IMAGES)
    images = np.stack([source.pixels(int(i))[:, :, 0] for i in rows]).astype(np.int16)
    noisy = (images + draws.integers(-12, 13, images.shape)).clip(0, 255).astype(np.uint8)
    folder = tmp_path / "idx"
    folder.mkdir()
    for split in ("train", "t10k"):
        write_idx(folder / f"{split}-images-idx3-ubyte", noisy)
        write_idx(folder / f"{split}-labels-idx1-ubyte", source.labels[rows].astype(np.uint8))
    return folder


def numbers(value: Any) -> Any:
    """Results without times and places."""
    if isinstance(value, dict):
        return {k: numbers(v) for k, v in value.items() if k not in ("seconds", "output_dir", "command", "environment")}
    return [numbers(v) for v in value] if isinstance(value, list) else value


@pytest.mark.slow
def test_twenty_random_kills_change_no_number(many_digits: Path, tmp_path: Path) -> None:
    torch.jit.script(train_small()).save(str(tmp_path / "small.ts"))
    flags = [
        "--checkpoint", "small.ts", "--suite", "table", "--autoattack", "no", "--data.source", "idx",
        "--data.root", "idx", "--data.image_size", "8", "--data.channels", "1", "--eps", "40/255", "--batch_size", "50",
    ]  # fmt: skip
    started = time.monotonic()
    whole = run_module(tmp_path, "mimir_fast.evaluate", *flags, "--output_dir", "whole", timeout=1200)
    assert whole.returncode == 0, whole.stderr
    undisturbed = time.monotonic() - started

    line = command_line("mimir_fast.evaluate", *flags, "--output_dir", "killed")
    draws, kills = random.Random(0), 0
    for _ in range(KILLS):
        process = subprocess.Popen(line, cwd=tmp_path, env=command_environment(), stdout=subprocess.DEVNULL)
        journals = tmp_path / "killed" / "progress"
        while not journals.exists() and process.poll() is None:
            time.sleep(0.1)
        try:  # from the first written line on, some time before a twentieth of the work is done
            process.wait(draws.uniform(0.2, undisturbed / KILLS))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    last = run_module(tmp_path, "mimir_fast.evaluate", *flags, "--output_dir", "killed", timeout=1200)
    assert last.returncode == 0, last.stderr
    one, other = (Results.read(tmp_path / name / "results.json").as_dict() for name in ("whole", "killed"))
    assert kills >= KILLS // 2, "most starts must be killed at work"
    assert numbers(one) == numbers(other) and one["images"]["count"] == IMAGES
