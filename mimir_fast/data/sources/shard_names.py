"""Which tar files are of which split: by whole words in their names, each file in one split only."""

import re
from dataclasses import dataclass
from pathlib import Path

from mimir_fast.data.sources.base import MissingDataError
from mimir_fast.data.sources.walk import say_others
from mimir_fast.validation import counted

ADVICE = (
    "give --data.root a brace pattern such as 'shards/train-{0000..0146}.tar', or a folder whose tar files are called "
    "train-….tar and val-….tar, or lie in folders train and val"
)
# Words that Hugging Face's `datasets` knows, too; of the splits to test on, the first there is.
_TRAIN = ("train", "training")
_TEST = (("val", "valid", "validation", "dev"), ("test", "testing", "eval", "evaluation"))


@dataclass
class ShardsBySplit:
    """The tar files under one root.

    Attributes:
        train, val, test: sorted paths.
        rest: those whose names say no split; they are to train on where a pattern names them and nothing says train.
    """

    root: str
    train: list[Path]
    val: list[Path]
    test: list[Path]
    rest: list[Path]

    def of(self, split: str) -> list[Path]:
        """The split's shards; to test on, those of val before those of test.

        Raises:
            MissingDataError: there are none.
        """
        shards = self.train if split == "train" else self.val or self.test
        if not shards:
            words = _TRAIN if split == "train" else [word for words in _TEST for word in words]
            raise MissingDataError(
                f"{self.root} has no tar files of the {split} split: none has one of the words {', '.join(words)} in "
                f"its name ({counted(len(self.train + self.val + self.test + self.rest), 'tar file')}): {ADVICE}"
            )
        return shards


def find_shards(root: str | None) -> ShardsBySplit:
    """The tar files of a folder or of a brace pattern, by split.

    Names are read as words, in which digits, dots, - and _ are no letters: `latest-train` trains and `trainval` says
    no split. A file without such a word is of the split that its folder is called. A pattern whose names say no
    split at all is to train on.

    Raises:
        MissingDataError: no root, or files that do not exist.
        ValueError: a name says two splits.
    """
    if root is None:
        raise MissingDataError(f"source 'webdataset' needs root: {ADVICE}")
    folder = Path(root).expanduser()
    if folder.is_dir():
        files = sorted(path for path in [*folder.glob("*.tar"), *folder.glob("*/*.tar")] if path.name[0] != ".")
        by_split = _by_split(root, files, in_folder=True)
        say_others(root, [path.name for path in by_split.rest], "of neither split by their names")
        return by_split
    files = _expand(root)
    by_split = _by_split(root, files, in_folder=False)
    if not by_split.train and not by_split.val and not by_split.test:
        by_split.train, by_split.rest = by_split.rest, []
    return by_split


def split_of(path: Path, with_folder: bool = True) -> str | None:
    """train, val or test, by the words of the file's name, or by its folder's whole name; None without such a word.

    Raises:
        ValueError: it has words of two splits.
    """
    folder = {path.parent.name.lower()} if with_folder else set()
    for words in (set(re.findall(r"[a-z]+", path.name.lower())), folder):
        found = [
            split for split, those in zip(("train", "val", "test"), (_TRAIN, *_TEST), strict=True) if words & set(those)
        ]
        if len(found) > 1:
            raise ValueError(f"{path}: is it of {' or '.join(found)}? Its name says both; rename it. {ADVICE}")
        if found:
            return found[0]
    return None


def _by_split(root: str, files: list[Path], in_folder: bool) -> ShardsBySplit:
    result = ShardsBySplit(root, [], [], [], [])
    for path in files:
        inner = not in_folder or path.parent != Path(root).expanduser()  # what the root is called says nothing
        getattr(result, split_of(path, with_folder=inner) or "rest").append(path)
    return result


def _expand(root: str) -> list[Path]:
    try:
        from webdataset.shardlists import expand_urls
    except ImportError as error:
        raise ImportError("source 'webdataset' needs the library: pip install webdataset") from error
    shards = [Path(url).expanduser() for url in expand_urls(root)]
    missing = [str(shard) for shard in shards if not shard.is_file()]
    if missing:
        raise MissingDataError(
            f"missing are {len(missing)} of {counted(len(shards), 'shard')}, first {missing[0]}: {ADVICE}"
        )
    return shards
