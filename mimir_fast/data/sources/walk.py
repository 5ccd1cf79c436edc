"""Which files of a folder are images: by their names, at any depth, as torchvision's ImageFolder takes them.

Unlike there, names that begin with a dot are left out, folders and files: they are what programs keep beside the data
(.ipynb_checkpoints, .git, macOS's ._x.jpg). What is left out is counted, for a message.
"""

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

from mimir_fast.data.sources.label_lists import LABEL_LISTS
from mimir_fast.validation import counted

EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".ppm", ".pgm", ".pbm", ".pnm", ".bmp", ".tif", ".tiff", ".webp", ".gif",
    ".avif", ".jp2",
)  # fmt: skip
INDEX_FOLDER = ".mimir_fast"
_LOG = logging.getLogger(__name__)


def is_image(name: str) -> bool:
    """Whether a file called so is taken for an image; upper case is as good."""
    return name.lower().endswith(EXTENSIONS)


def is_hidden(name: str) -> bool:
    """Whether the path has a part that begins with a dot."""
    return any(part.startswith(".") for part in name.split("/"))


@dataclass
class Walk:
    """What a folder holds; names are relative to it.

    Attributes:
        images: sorted by folder, then by name.
        folders: all that were looked into, "" for the folder itself.
        others: what is no image, or hidden.
    """

    images: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


def walk(folder: Path) -> Walk:
    """Everything below `folder`; links are followed, but not to a folder above them."""
    found, ahead = Walk(), [("", frozenset[tuple[int, int]]())]
    while ahead:
        inner, above = ahead.pop()
        status = os.stat(os.path.join(folder, inner))
        if (here := (status.st_dev, status.st_ino)) in above:
            continue
        found.folders.append(inner)
        for entry in os.scandir(os.path.join(folder, inner)):
            name = os.path.join(inner, entry.name)
            if entry.name.startswith("."):
                found.others += [name] * (entry.name != INDEX_FOLDER)
            elif entry.is_dir():
                ahead.append((name, above | {here}))
            elif entry.name not in LABEL_LISTS:
                (found.images if is_image(name) and entry.is_file() else found.others).append(name)
    found.images.sort(key=os.path.split)
    found.folders.sort()
    found.others.sort()
    return found


def say_others(where: Path | str, others: list[str], why: str = "hidden or no images by their names") -> None:
    """One line about what is not taken."""
    if others:
        names = ", ".join(others[:3]) + (", …" if len(others) > 3 else "")
        _LOG.warning("%s: %s left out, %s: %s", where, counted(len(others), "file"), why, names)
