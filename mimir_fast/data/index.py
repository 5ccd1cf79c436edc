"""Indexes that are made once: kept on disk, mapped into memory by every process that starts later.

Listing a million files takes seconds on a local disk and many minutes on a busy network disk, on every rank of every
start. So the list is written beside the data (hidden folder `.mimir_fast` of the root), or under the user's cache
folder where the data may not be written to, or nowhere (then it is made each time). The first process makes it while
the others wait at a file lock. Whether it still holds is seen from a fingerprint that is cheap to take: of a tree of
folders, their names and times of change, for a folder changes when a file or folder in it comes or goes. The index
itself says which folders there were.
"""

import fcntl
import hashlib
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from mimir_fast.checkpoints.durable import write_whole
from mimir_fast.data.npz import MissingArrayError, map_member

_VERSION = "2"
_TICK_NS = 100_000_000
_LOG = logging.getLogger(__name__)
Arrays = dict[str, np.ndarray]


def kept_index(
    root: Path, name: str, fingerprint: Callable[[Arrays], str], names: tuple[str, ...], make: Callable[[], Arrays]
) -> Arrays:
    """The index `name` of the data under `root`: mapped from disk if it is there and holds, else made and written.

    Args:
        fingerprint: of the data that an index tells of; differs if they changed. OSError: they are gone.
        names: the arrays it consists of.
        make: makes them.
    """
    places = _places(root, name)
    for place in places:
        if (found := _load(place, fingerprint, names)) is not None:
            return found
    arrays: Arrays | None = None
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with _locked(place.with_suffix(".lock")):
                if (found := _load(place, fingerprint, names)) is not None:  # another process was quicker
                    return found
                arrays = make() if arrays is None else arrays
                _save(place, _digest(fingerprint, arrays), arrays)
                return arrays
        except OSError as error:
            _LOG.info("no index at %s (%s)", place, error)
    _LOG.warning(
        "neither %s could be written: %s will be listed anew at each start; set XDG_CACHE_HOME to a folder that can be "
        "written", " nor ".join(map(str, places)), root,
    )  # fmt: skip
    return make() if arrays is None else arrays


def fingerprint_of(paths: list[Path]) -> str:
    """Names, times of change and sizes.

    What was changed just now may change again within the same tick of the clock, which no time would show: then the
    fingerprint is one that never comes again.
    """
    lines, now = [], time.time_ns()
    for path in paths:
        status = path.stat()
        if now - status.st_mtime_ns < _TICK_NS:
            lines.append(uuid.uuid4().hex)
        lines.append(f"{path} {status.st_mtime_ns} {status.st_size}")
    return "\n".join(lines)


def _places(root: Path, name: str) -> list[Path]:
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    digest = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:24]
    return [root / ".mimir_fast" / f"{name}.npz", home / "mimir_fast" / "index" / f"{digest}-{name}.npz"]


def _digest(fingerprint: Callable[[Arrays], str], arrays: Arrays) -> str:
    return hashlib.sha256(f"{_VERSION} {fingerprint(arrays)}".encode()).hexdigest()


def _load(place: Path, fingerprint: Callable[[Arrays], str], names: tuple[str, ...]) -> Arrays | None:
    if not place.is_file():
        return None
    try:
        arrays = {name: map_member(place, name) for name in names}
        kept = str(map_member(place, "fingerprint")[0])
        with suppress(FileNotFoundError, NotADirectoryError):  # of what is gone
            return arrays if _digest(fingerprint, arrays) == kept else None
        return None
    except MissingArrayError:
        return None  # of an older version
    except (ValueError, OSError) as error:
        _LOG.warning("the index %s is damaged (%s); making it anew", place, error)
        return None


def _save(place: Path, fingerprint: str, arrays: Arrays) -> None:
    def write(aside: Path) -> None:
        with aside.open("wb") as file:  # savez would add .npz to a name
            np.savez(file, fingerprint=np.array([fingerprint]), **arrays)  # type: ignore[arg-type]

    write_whole(place, write)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; on a file system without locks several may work side by side, which does no harm."""
    with path.open("w") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
