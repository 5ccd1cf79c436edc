"""The index of a folder: made once, by one process, kept where it can be, and not believed when the data changed."""

import multiprocessing
import os
import stat
import time
from pathlib import Path

import numpy as np
import pytest

from mimir_fast.checkpoints.durable import write_whole
from mimir_fast.data import DataConfig, build_source, index
from mimir_fast.data.index import kept_index


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def listings(monkeypatch):
    """The class folders that were listed, in order."""
    seen, original = [], os.scandir

    def scandir(folder):
        if Path(folder).parent.name in ("train", "val"):
            seen.append(folder)
        return original(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    return seen


def build(root, split="train"):
    time.sleep(0.15)  # an index of what changed just now is not kept
    return build_source(DataConfig(source="folder", root=str(root)), split)


def test_the_second_start_lists_nothing(image_folder, listings):
    first = build(image_folder)
    assert len(listings) == 3
    second = build(image_folder)
    assert len(listings) == 3
    assert [second.where(i) for i in range(25)] == [first.where(i) for i in range(25)]
    assert (second.labels == first.labels).all()
    assert isinstance(second.paths, np.memmap)  # the ranks of a machine share one copy
    assert len(build(image_folder, "test")) == 8  # an index of its own


@pytest.mark.parametrize("change", ["added", "removed", "renamed", "new class"])
def test_a_changed_folder_is_listed_anew(image_folder, listings, change):
    before = build(image_folder)
    file = before.path(3)
    if change == "added":
        (file.parent / "new.jpg").write_bytes(file.read_bytes())
    elif change == "removed":
        file.unlink()
    elif change == "renamed":
        file.rename(file.with_name("other.jpg"))
    else:
        (image_folder / "train" / "digit_7").mkdir()
        (image_folder / "train" / "digit_7" / "x.jpg").write_bytes(file.read_bytes())
    after = build(image_folder)
    assert len(listings) > 3
    there = sorted(str(path) for path in (image_folder / "train").glob("*/*"))
    assert sorted(after.where(i) for i in range(len(after))) == there


def test_it_goes_to_the_users_cache_where_the_data_cannot_be_written(image_folder, listings, cache, monkeypatch):
    refuse_below(monkeypatch, image_folder)
    build(image_folder)
    assert not (image_folder / ".mimir_fast").exists() and list(cache.glob("mimir_fast/index/*.npz"))
    build(image_folder)
    assert len(listings) == 3


def test_without_any_place_it_is_said_and_done_each_time(image_folder, listings, cache, monkeypatch, caplog):
    refuse_below(monkeypatch, image_folder, cache)
    assert len(build(image_folder)) == len(build(image_folder)) == 25
    assert len(listings) == 6 and "XDG_CACHE_HOME" in caplog.text


def refuse_below(monkeypatch, *folders):
    """As a read-only file system does (root ignores permissions, so these alone would not do)."""
    original = os.mkdir

    def mkdir(path, *arguments, **options):
        if any(str(path).startswith(str(folder)) for folder in folders):
            raise OSError(30, "Read-only file system", str(path))
        return original(path, *arguments, **options)

    monkeypatch.setattr(os, "mkdir", mkdir)


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "another fingerprint"])
def test_a_damaged_index_is_made_again(image_folder, listings, damage):
    build(image_folder)
    path = image_folder / ".mimir_fast" / "train.npz"
    content = path.read_bytes()
    if damage == "another fingerprint":
        arrays = dict(np.load(path))
        np.savez(path, **{**arrays, "fingerprint": np.array(["0" * 64])})
    else:
        path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "text": b"index"}[damage])
    assert len(build(image_folder)) == 25 and len(listings) == 6
    build(image_folder)
    assert len(listings) == 6


def test_ranks_that_start_together_make_it_once(tmp_path):
    """Four processes; the first makes the index, the others wait for it."""
    trace, barrier = tmp_path / "made", multiprocessing.get_context("fork").Barrier(4)
    (tmp_path / "data").mkdir()

    def make():
        with trace.open("a") as file:
            file.write("x")
        return {"numbers": np.arange(100_000)}

    def start():
        barrier.wait()
        arrays = kept_index(tmp_path / "data", "train", lambda _: "print", ("numbers",), make)
        os._exit(int(arrays["numbers"].sum() != 4_999_950_000))

    processes = [multiprocessing.get_context("fork").Process(target=start) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert trace.read_text() == "x"


def test_a_file_system_without_locks_is_no_hindrance(image_folder, monkeypatch):
    def refuse(file, operation):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(index.fcntl, "flock", refuse)
    assert len(build(image_folder)) == 25 and (image_folder / ".mimir_fast" / "train.npz").is_file()


def test_what_is_written_is_whole_or_not_there(tmp_path):
    def fail(aside):
        aside.write_text("half")
        raise OSError(28, "No space left on device")

    (tmp_path / "file").write_text("before")
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "file", fail)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "before")]
    assert stat.S_ISREG((tmp_path / "file").stat().st_mode)
