"""The members of an uncompressed tar file, or why it is not whole."""

import tarfile
from collections.abc import Iterator
from pathlib import Path

_BLOCK = tarfile.BLOCKSIZE
_LOOK_BEHIND = 2**20  # bytes after the end in which another archive would begin


def members_of(path: Path) -> Iterator[tarfile.TarInfo]:
    """Headers of all regular files, in order; `offset_data` and `size` say where each lies.

    A tar that was cut between two members ends without the block of zeros that every writer puts there; Python's
    tarfile, webdataset and DALI take it for whole. What stands behind the end (`cat a.tar b.tar`) they do not see.

    Raises:
        ValueError: not a tar file, compressed, cut short, with more behind its end, or with a member whose name leads
            out of it.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.name.startswith("/") or ".." in member.name.split("/"):
                    raise ValueError(f"{path}: a member is called {member.name!r}, outside of the archive; refused")
                if member.offset_data + member.size > path.stat().st_size:
                    raise ValueError(
                        f"{path} is cut short: {member.name} ends past the end of the file; fetch it again"
                    )
                if member.isfile():
                    yield member
            end = archive.offset
    except tarfile.TarError as error:
        raise ValueError(f"{path} is not a whole, uncompressed tar file ({error}); make or fetch it again") from error
    with path.open("rb") as file:
        file.seek(end)
        tail = file.read(_LOOK_BEHIND)
    if len(tail) < _BLOCK or any(tail[:_BLOCK]):
        raise ValueError(f"{path} is cut short: it ends without the mark of its end; fetch it again")
    if any(tail):
        raise ValueError(f"{path} holds more behind its end, perhaps a second archive; unpack and pack it as one")
