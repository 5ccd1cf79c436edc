"""Writing that no kill can leave half done: aside, synced to disk, renamed."""

import os
import shutil
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
    """Make `link` a symbolic link to `target`, from one moment to the next."""
    if link.is_dir() and not link.is_symlink():  # written before there were links
        remove(link)
    aside = link.with_name(link.name + PARTIAL)
    aside.unlink(missing_ok=True)
    aside.symlink_to(target)
    move(aside, link)


def remove(path: Path) -> None:
    """Delete a file, link or folder; a folder loses its name first, so that no kill leaves half of it under that."""
    if path.is_dir() and not path.is_symlink():
        if not path.name.endswith(PARTIAL):
            doomed = path.with_name(f"{path.name}.old{PARTIAL}")
            shutil.rmtree(doomed, ignore_errors=True)
            path = path.rename(doomed)
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
