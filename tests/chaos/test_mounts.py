"""Runs on a bucket as clouds mount it: a FUSE file system without symbolic links, and without a cache no seeking."""

import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from chaos.faults import kill
from chaos.runs import FINETUNE, PATIENCE, Runs
from commands import zygote

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("rclone") and shutil.which("fusermount3") and os.access("/dev/fuse", os.W_OK)),
        reason="needs rclone, fuse3 and /dev/fuse",
    ),
]


@contextmanager
def mounted(folder: Path, mode: str) -> Iterator[Path]:
    """A local folder as rclone would show a bucket's."""
    bucket, point = folder / "bucket", folder / "mount"
    for made in (bucket, point):
        made.mkdir()
    server = subprocess.Popen(
        ["rclone", "mount", "--config", "/dev/null", f":local:{bucket}", str(point), "--vfs-cache-mode", mode,
         "--cache-dir", str(folder / "cache"), "--log-file", str(folder / "rclone.log")],
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not point.is_mount():
            assert server.poll() is None and time.monotonic() < deadline, (folder / "rclone.log").read_text()
            time.sleep(0.1)
        yield point
    finally:
        subprocess.run(["fusermount3", "-u", "-z", str(point)], check=False)
        server.terminate()
        server.wait(60)


def test_a_mount_without_seeking_is_refused_at_once(tmp_path: Path) -> None:
    runs = Runs(tmp_path, zygote())
    with mounted(tmp_path, "off") as mount:
        for _ in range(2):
            process = runs.start(mount / "runs" / "run", job=FINETUNE)
            assert process.wait(PATIENCE) == 2
            assert "cannot seek in a file that it writes" in process.said(), process.said()
            assert "--vfs-cache-mode writes" in process.said()
            assert not list(mount.iterdir())


def test_same_bits_and_best_on_a_mount_without_links(tmp_path: Path) -> None:
    """With two starts killed; and no deleted checkpoint stays."""
    runs, rng = Runs(tmp_path, zygote()), random.Random(3)
    with mounted(tmp_path, "writes") as mount:
        run = mount / "run"
        for _ in range(2):
            kill(runs, run, FINETUNE, rng)
        runs.finish(run, job=FINETUNE)
        assert (run / "checkpoints" / "best").is_file()
        runs.check_same(run, job=FINETUNE)
