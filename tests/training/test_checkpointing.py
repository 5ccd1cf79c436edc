"""Which checkpoint is the best, whatever happens to the saves."""

import errno
import os
from pathlib import Path

import pytest
import torch

from mimir_fast.checkpoints.reading import read_meta
from mimir_fast.training.checkpointing import Checkpointing
from mimir_fast.training.loggers import Logger
from mimir_fast.training.run_config import RunConfig
from mimir_fast.training.run_folder import RunFolder
from mimir_fast.world import World

WORLD = World(0, 1, torch.device("cpu"))


class Said(Logger):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run", WORLD)


def checkpointing(folder: RunFolder) -> Checkpointing:
    return Checkpointing(folder, WORLD, RunConfig(save_every=10, keep_last=1), Said())


def save(checkpoints: Checkpointing, step: int, score: float | None = None) -> bool:
    if score is not None:
        checkpoints.scored(step, score)
    checkpoints.save(step, {"model/w": torch.full((4,), float(step))}, {"step": step})
    return checkpoints.settle() and checkpoints.saved == step


def test_the_best_is_kept_and_remembered(folder: RunFolder) -> None:
    checkpoints = checkpointing(folder)
    for step, score in ((1, 0.5), (2, 0.4), (3, None)):
        assert save(checkpoints, step, score)
    assert sorted(p.name for p in folder.checkpoints.iterdir()) == ["best", "step-00000001", "step-00000003"]
    assert folder.best() == folder.checkpoints / "step-00000001"
    meta = read_meta(folder.checkpoints / "step-00000003")
    assert (meta["best_score"], meta["best_step"]) == (0.5, 1)
    again = checkpointing(folder)
    again.restore(3, meta)
    assert again.best == (0.5, 1)


def test_a_best_one_that_could_not_be_written_is_not_the_best(folder: RunFolder) -> None:
    """What is best is what is there: a worse score can be the best after the better one was lost to a full disk."""
    checkpoints = checkpointing(folder)
    folder.path.mkdir()
    folder.checkpoints.write_text("in the way of the folder")
    assert not save(checkpoints, 1, 0.9)
    said = checkpoints.logger.lines[0]  # type: ignore[attr-defined]
    assert "could not write checkpoint" in said and said.endswith(". The next try is in 10 steps at most")
    folder.checkpoints.unlink()
    assert save(checkpoints, 2)  # its weights were not evaluated
    assert folder.best() is None and read_meta(folder.checkpoints / "step-00000002")["best_score"] is None
    assert save(checkpoints, 3, 0.6)
    assert folder.best() == folder.checkpoints / "step-00000003"


def test_the_last_try_of_a_best_one_counts(folder: RunFolder) -> None:
    checkpoints = checkpointing(folder)
    folder.path.mkdir()
    folder.checkpoints.write_text("in the way of the folder")
    checkpoints.scored(5, 0.7)
    assert checkpoints.due(5, 5, timed=False)
    tensors, meta = {"model/w": torch.ones(4)}, {"step": 5}
    with pytest.raises(OSError, match="could not write checkpoint"):
        checkpoints.finish(5, tensors, meta)
    folder.checkpoints.unlink()
    checkpoints.finish(5, tensors, meta)
    assert folder.best() == folder.checkpoints / "step-00000005"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_only_a_full_disk_is_told_to_be_freed(folder: RunFolder, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def full(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    checkpoints = checkpointing(folder)
    monkeypatch.setattr(os, "fsync", full)
    assert not save(checkpoints, 1)
    said = checkpoints.logger.lines[0]  # type: ignore[attr-defined]
    assert said.endswith(". Free some space: the next try is in 10 steps at most")
