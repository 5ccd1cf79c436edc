"""Whether the storage can do what a run will ask of it, tried before hours of training depend on it.

Mounts of buckets write files from begin to end only, some shares cannot rename over a file. A run would learn it at
its first save.
"""

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from mimir_fast.checkpoints.durable import is_full, move, point, pointed_at, remove, sync, write_text
from mimir_fast.checkpoints.tensor_files import save_tensors

_CACHED = (
    "mount it with a cache for what is written (rclone mount --vfs-cache-mode writes, s3fs use_cache), or train on a "
    "local disk and copy"
)
_ELSEWHERE = "train on another file system (a local disk, NFS, Lustre) and copy"


def try_storage(folder: Path) -> None:
    """Do all that a run does with its storage in `folder`, which is made for it and deleted.

    Raises:
        OSError: something cannot be done; says what, and what to do about it.
    """
    trials: dict[str, tuple[Callable[[Path], None], str]] = {
        "make a folder": (Path.mkdir, _ELSEWHERE),
        "replace a file": (_replace, _ELSEWHERE),
        "seek in a file that it writes": (_seek, _CACHED),
        "write tensors": (_write_tensors, _CACHED),
        "append to a file": (_append, _CACHED),
        "sync a folder to disk": (sync, _ELSEWHERE),
        "rename a folder": (_rename, _ELSEWHERE),
        "delete": (_delete, _ELSEWHERE),
        "keep the name of the best checkpoint": (_point, _ELSEWHERE),
    }
    try:
        for what, (attempt, advice) in trials.items():
            try:
                attempt(folder)
            except Exception as error:  # safetensors has a type of its own
                said = getattr(error, "strerror", None) or error
                raise OSError(
                    f"the storage of {folder.parent} cannot {what} ({said}): {_advice(error, advice)}"
                ) from error
    finally:
        with suppress(OSError):  # where the storage cannot even delete, the next start tries again
            remove(folder)


def _advice(error: Exception, advice: str) -> str:
    if is_full(error):
        return "free some space"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS):
        return "ask for the right to write there, or choose another --output_dir"
    return advice


def _replace(folder: Path) -> None:
    for text in ("old", "new"):
        write_text(folder / "file", text)
        _expect((folder / "file").read_text(), text)


def _seek(folder: Path) -> None:
    """As the lock's file is written, and tensors by safetensors, which sets the length first."""
    descriptor = os.open(folder / "seek", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        os.ftruncate(descriptor, 4)
        os.pwrite(descriptor, b"34", 2)
        os.pwrite(descriptor, b"12", 0)
    finally:
        os.close(descriptor)
    _expect((folder / "seek").read_text(), "1234")


def _write_tensors(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file

    tensor = torch.arange(1000)
    save_tensors({"x": tensor}, folder / "tensors")
    _expect(torch.equal(load_file(folder / "tensors")["x"], tensor), True)


def _append(folder: Path) -> None:
    """Two starts write into one metrics.jsonl; mounts have lost what the second one wrote, without an error."""
    for text in ("1\n", "2\n"):
        with (folder / "append").open("a") as file:
            file.write(text)
    _expect((folder / "append").read_text(), "1\n2\n")


def _rename(folder: Path) -> None:
    (folder / "a").mkdir()
    (folder / "a" / "file").touch()
    move(folder / "a", folder / "b")
    _expect((folder / "b" / "file").exists(), True)


def _delete(folder: Path) -> None:
    for path in list(folder.iterdir()):
        remove(path)
    _expect([path.name for path in folder.iterdir()], [])


def _point(folder: Path) -> None:
    for name in ("a", "b"):
        point(folder / "best", name)
        _expect(pointed_at(folder / "best"), folder / name)


def _expect(found: object, wanted: object) -> None:
    if found != wanted:
        raise OSError(f"{found!r} is there, not {wanted!r}")
