"""One start at a time in a run folder.

A POSIX record lock on `.lock`: the kernel (or the NFS server) lets go of it when the process ends, however it ends, and
forked data workers do not inherit it. The file says who holds it.
"""

import errno
import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from mimir_fast.training.launch import agent, launch_id


class FolderInUse(OSError):
    """Another process works in the folder."""


class Lock:
    """Held from `acquire` to `release` or the end of the process.

    Args:
        path: the lock file; made if need be.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None
        self._made: list[Path] = []  # the file and the folders above it, as far as they were not there before
        self.warning: str | None = None
        """What the person watching should know, once it is held."""

    def acquire(self, patience: float = 60.0) -> None:
        """Take the lock. A former process of the same launch that is still ending is waited for, `patience` seconds.

        Raises:
            FolderInUse: another process holds it; says which.
        """
        if not self.path.exists():
            self._made = [self.path, *(folder for folder in self.path.parents if not folder.exists())]
            self.path.parent.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + patience
        descriptor = self._open()
        us = {"launch": launch_id(), "agent": agent()}  # of a torchrun, which ends one attempt and starts the next
        while not self._try(descriptor):
            holder = _read(descriptor)
            ours = any(holder.get(name) is not None and holder.get(name) == own for name, own in us.items())
            if not ours or time.monotonic() > deadline:
                os.close(descriptor)
                self._made = []  # it is the other's
                raise FolderInUse(
                    f"{self.path.parent} is in use by process {holder.get('pid', '?')} on {holder.get('host', '?')}, "
                    f"started {holder.get('started', '?')}: wait for it, stop it, or choose another --output_dir"
                )
            time.sleep(0.2)
        if not self._is_the_file(descriptor):
            os.close(descriptor)
            return self.acquire(patience)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": started, **us})
        self._file = descriptor
        with suppress(OSError):  # it only says who holds the lock; what the storage cannot do is found out after
            os.pwrite(descriptor, text.encode().ljust(512), 0)

    def release(self, *, forget: bool = False) -> None:
        """Let go, if it is held.

        Args:
            forget: delete the file, and the folders that were made for it and are empty, also where taking it failed.
        """
        if forget and self._made:
            self.path.unlink(missing_ok=True)
            with suppress(OSError):  # somebody else has put something into one of them
                for folder in self._made[1:]:
                    folder.rmdir()
        self._made = []
        if self._file is not None:
            with suppress(OSError):  # of what could not be written into it
                os.close(self._file)
            self._file = None

    def _open(self) -> int:
        return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def _is_the_file(self, descriptor: int) -> bool:
        """False where the file was deleted by whoever held it before, so that the next start makes another."""
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _try(self, descriptor: int) -> bool:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            # Lustre without -o flock and some FUSE mounts: better a run without a lock than none.
            self.warning = f"{self.path.parent} is on a file system without locks ({error}): start only one run in it"
        return True


def _read(descriptor: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(descriptor, 512, 0))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
