"""Which checkpoint a run goes on from, which are kept, and how `best` is found."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from run_folders import damage, names, opened, save

from mimir_fast.checkpoints import checksums
from mimir_fast.checkpoints.reading import CheckpointError, WeightsError, read_meta, resolve_checkpoint
from mimir_fast.models.weight_files import read_weights

pytestmark = pytest.mark.usefixtures("no_scheduler")


def test_a_new_run_has_none(tmp_path: Path) -> None:
    assert opened(tmp_path).choose() is None


def test_the_newest_whole_one_is_taken_and_damaged_ones_put_aside(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    for step in (1, 2, 3):
        save(tmp_path, step)
    damage(tmp_path / "checkpoints" / "step-00000003")
    (tmp_path / "checkpoints" / "step-00000002" / "meta.json").write_text("{")
    assert folder.choose() == tmp_path / "checkpoints" / "step-00000001"
    assert names(tmp_path) == ["step-00000001", "step-00000002.damaged", "step-00000003.damaged"]
    assert len(folder.notes) == 2 and all("Put aside as" in note for note in folder.notes)


def test_what_the_storage_does_not_give_is_passed_over_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = opened(tmp_path)
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    read = checksums.crc32

    def broken(path: Path, *args: int) -> str:
        if path.parent == newer:
            raise OSError(errno.EIO, "Input/output error")
        return read(path, *args)

    monkeypatch.setattr(checksums, "crc32", broken)
    monkeypatch.setattr("time.sleep", lambda _: None)
    assert folder.choose() == older
    assert names(tmp_path) == [older.name, newer.name]
    assert "Input/output error). It stays where it is; going on from the one before it" in folder.notes[0]
    folder.close()


def test_with_none_whole_nothing_is_touched(tmp_path: Path) -> None:
    """Starting anew by itself would lose what a person might still repair."""
    folder = opened(tmp_path)
    damage(save(tmp_path, 1))
    with pytest.raises(CheckpointError, match=r"none of the 1 checkpoints .* --overwrite to start anew"):
        folder.choose()
    assert names(tmp_path) == ["step-00000001"]


def test_best_and_marked_steps_and_the_last_healthy_one_are_kept(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    for step in range(1, 10):
        target = save(tmp_path, step, healthy=step < 5)
        if step == 2:
            folder.set_best(target)
        folder.prune(keep_last=2, keep_every=3)
    assert names(tmp_path) == ["best", *(f"step-{s:08d}" for s in (2, 3, 4, 6, 8, 9))]
    assert read_meta(tmp_path / "checkpoints" / "best")["step"] == 2


def test_best_may_move_back_and_forth_and_frees_the_old_one(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    for step in (1, 2, 3):
        folder.set_best(save(tmp_path, step))
        folder.prune(keep_last=1, keep_every=0)
    assert names(tmp_path) == ["best", "step-00000003"]
    assert os.readlink(tmp_path / "checkpoints" / "best") == "step-00000003"


@pytest.mark.parametrize("links", [True, False])
def test_best_is_found_by_every_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    """Storage without symbolic links keeps the name in a file."""
    if not links:
        monkeypatch.setattr(os, "symlink", _no_links)
    folder = opened(tmp_path)
    for step in (1, 2, 3):
        target = save(tmp_path, step)
        if step == 1:
            folder.set_best(target)
        folder.prune(keep_last=1, keep_every=0)
    best = tmp_path / "checkpoints" / "best"
    assert best.is_symlink() is links
    assert names(tmp_path) == ["best", "step-00000001", "step-00000003"]
    assert folder.best() == tmp_path / "checkpoints" / "step-00000001"
    assert folder.restore_best(None) and not folder.restore_best(2) and folder.restore_best(3)
    folder.set_best(tmp_path / "checkpoints" / "step-00000001")
    for named in (resolve_checkpoint(tmp_path), resolve_checkpoint(tmp_path, "best"), resolve_checkpoint(best)):
        assert read_meta(named)["step"] == 1
    with pytest.raises(WeightsError, match=r"\(weights of step 1\)"):  # found; it is no model
        read_weights(best)
    folder.close()
    opened(tmp_path, "--seed", "7", overwrite=True).close()
    assert not (tmp_path / "checkpoints").exists()


def test_nothing_is_deleted_while_the_storage_does_not_say_which_is_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = opened(tmp_path)
    monkeypatch.setattr(os, "symlink", _no_links)
    folder.set_best(save(tmp_path, 1))
    save(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", _no_links)
        folder.prune(keep_last=1, keep_every=0)
    assert names(tmp_path) == ["best", "step-00000001", "step-00000002"]


def test_what_could_not_be_deleted_goes_with_the_next_save(tmp_path: Path) -> None:
    """A mount that fails to delete for a moment filled up with step-….old.partial."""
    folder = opened(tmp_path)
    save(tmp_path, 1).rename(tmp_path / "checkpoints" / "step-00000001.old.partial")
    save(tmp_path, 2)
    folder.prune(keep_last=1, keep_every=0)
    assert names(tmp_path) == ["step-00000002"]


def _no_links(*args: Any, **options: Any) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))
