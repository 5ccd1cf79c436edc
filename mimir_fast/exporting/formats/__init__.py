"""The export formats: one a file, found by itself.

To add one, write a file in this folder that calls `register(Format(…))`; nothing else has to change.
"""

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from mimir_fast.exporting.original import Original
from mimir_fast.registry import Registry
from mimir_fast.versions import install_command, python_command


@dataclass(frozen=True)
class Format:
    """One way to write a model.

    Attributes:
        name: as it is typed.
        suffix: of the file; "" for a folder.
        write: (original, path) → `difference` of what was written, read back by the format's own library.
        use: (original, path) → lines of code that use it.
        needs: packages, as they are imported.
        extra: of pyproject.toml, which installs them.
        holds: of a folder, the names that may be replaced.
        wrote: whether a folder is one that `write` made; no other is replaced.
        keeps_all: it has every tensor, both domains and the decoder, and is compared by them.
    """

    name: str
    suffix: str
    write: Callable[[Original, Path], float]
    use: Callable[[Original, Path], str]
    needs: tuple[str, ...] = ()
    extra: str = ""
    holds: frozenset[str] = frozenset()
    wrote: Callable[[Path], bool] = lambda folder: False
    keeps_all: bool = False

    def check_name(self, path: Path) -> None:
        """Raises ValueError where a path does not say what it is."""
        if self.suffix and path.suffix != self.suffix:
            raise ValueError(f"--output {path}: wanted a name that ends in {self.suffix}")
        known = {other.suffix for other in FORMATS.all().values()} - {""}
        if not self.suffix and path.suffix in known:
            raise ValueError(f"--output {path}: --format {self.name} writes a folder, give a name without a suffix")

    def check_installed(self) -> None:
        """Raises ImportError, saying what to type, where a package is missing."""
        missing = [name for name in self.needs if find_spec(name) is None]
        if missing:
            raise ImportError(f"--format {self.name} needs {', '.join(missing)}: {install_command(self.extra)}")


def program_use(original: Original, path: Path, python: str) -> str:
    """How a program is used: in Python, and, if it classifies, in our evaluation."""
    if original.num_classes is None:
        return python
    evaluate = shlex.join([python_command(), "-m", "mimir_fast.evaluate", "--checkpoint", str(path)])
    return f"{python}\n     {evaluate} --data.source …"


FORMATS: Registry[Format] = Registry("format", __name__)


def says(path: Path, key: str, value: str) -> bool:
    """True for a JSON file of an object that has this value."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get(key) == value


def register(format: Format) -> None:
    """Add a format.

    Raises:
        ValueError: its name is taken.
    """
    FORMATS.add(format.name, format)
