"""Writing that no kill can leave half done: aside, synced to disk, renamed."""

import errno
import os
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path

PARTIAL = ".partial"  # of what is being written or deleted; left by a kill, removed at the next start


def write_text(path: Path, text: str) -> None:
    """Replace a file: whoever looks sees the old content or the new one.

    Raises:
        OSError: it cannot be written; the old file is intact.
    """
    aside = path.with_name(path.name + PARTIAL)
    try:
        aside.write_text(text)
        sync(aside)
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Run `write` on a file aside, make it durable, and give it its name: whole or not at all.

    Several processes, also of several machines that share the folder, may write the same file at once: each has a file
    of its own aside, and the last one's stays.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    aside = path.with_name(f".{path.name}.{secrets.randbits(48)}{PARTIAL}")
    try:
        write(aside)
        sync(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file or a folder's list of names is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # the system does not say which file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


def move(old: Path, new: Path) -> None:
    """Rename, and wait until the new name is on the disk."""
    old.replace(new)
    sync(new.parent)


def point(link: Path, target: str) -> None:
    """Make `link` stand for its neighbour `target`, from one moment to the next.

    A symbolic link, or, on storage that has none (buckets, some FUSE mounts), a text file with the name.
    """
    if link.is_dir() and not link.is_symlink():  # written before there were links
        remove(link)
    aside = link.with_name(link.name + PARTIAL)
    aside.unlink(missing_ok=True)
    try:
        aside.symlink_to(target)
    except OSError:  # EPERM, EOPNOTSUPP, EIO …: each storage has its own; a full disk fails once more
        write_text(link, target + "\n")
    else:
        move(aside, link)


def pointed_at(link: Path) -> Path | None:
    """What `point` made `link` stand for, whether that is there or not; None where it stands for nothing.

    Raises:
        OSError: the storage does not say.
    """
    try:
        target = os.readlink(link) if link.is_symlink() else link.read_text().strip()
        return link.with_name(target)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):  # the last: no name is in it
        return None


def is_full(error: BaseException | str) -> bool:
    """Whether the disk, or somebody's share of it, is full; told by the text, which passes from rank to rank."""
    return any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT))


def remove(path: Path) -> None:
    """Delete a file, link or folder; a folder loses its name first, so that no kill leaves half of it under that."""
    if path.is_dir() and not path.is_symlink():
        if not path.name.endswith(PARTIAL):
            doomed = path.with_name(f"{path.name}.old{PARTIAL}")
            _delete_folder(doomed)
            path = path.rename(doomed)
        _delete_folder(path)
    else:
        path.unlink(missing_ok=True)


def _delete_folder(folder: Path) -> None:
    """Delete what is there with all that is in it.

    A mount that numbers its files anew after a rename (rclone) makes rmtree believe that the folder was exchanged for
    another, so it is asked again. What stays even then is a leftover for the next save or start.
    """
    for pause in (0.1, 0.5, 0.0):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(pause)
