"""The fenced blocks and inline commands of the documentation.

A comment before a block says what the tests do with it, where that is not the default (python: run; sh: parse):
`<!-- test: run -->` runs its commands in the page's order, small in CI and as typed with `-m slow`;
`<!-- test: parse -->` only parses it: it needs data, a GPU or more machines than there are.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "launch/README.md", *(ROOT / "docs").rglob("*.md")]
)
_FENCE = re.compile(
    r"(?:<!-- test: (?P<marker>\w+) -->\n)?^```(?P<language>\w+)?(?: title=\"(?P<title>[^\"]+)\")?\n(?P<text>.*?)^```$",
    flags=re.M | re.S,
)
_INLINE = re.compile(r"`((?:python -m|torchrun|sbatch|kubectl|sky|make|mimir-fast|pip install) [^`]*)`")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        line: of the page, where the fence opens.
        marker: `run`, `parse` or "".
        title: a file name: the block is that file.
    """

    page: Path
    line: int
    language: str
    text: str
    marker: str
    title: str

    @property
    def place(self) -> str:
        """Where a reader finds it."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command of a shell block, comments and continued lines resolved."""
        return split_commands(self.text)


def split_commands(text: str) -> list[list[str]]:
    """One list of words a line; a backslash continues a line, `#` starts a comment."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text = page.read_text()
    found = []
    for match in _FENCE.finditer(text):
        line = text[: match.start()].count("\n") + 1 + (match["marker"] is not None)
        found.append(
            Block(page, line, match["language"] or "", match["text"], match["marker"] or "", match["title"] or "")
        )
    return found


def inline_commands(page: Path) -> list[str]:
    """Commands between single backticks; those with an ellipsis are meant to be filled in."""
    return [command for command in _INLINE.findall(prose_of(page)) if "…" not in command]


def prose_of(page: Path) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", page.read_text())
