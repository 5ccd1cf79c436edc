"""Parquet files of encoded images, as Hugging Face gives ImageNet: columns `image` (a struct with `bytes`) and `label`.

A file is read by row groups (a hundred images or so), of which each process keeps the last few. So the order is one of
blocks, a row group long, as for tar shards, but with few of them mixed at a time: `window`. The rows are expected to be
mixed already, as they are in ImageNet's files. Faster, and mixed anew over all images: `mimir_fast.data.prepare`.
"""

import json
import re
from collections import Counter, OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from mimir_fast.data.config import DataConfig
from mimir_fast.data.decode import UnreadableImageError
from mimir_fast.data.index import Arrays, fingerprint_of, kept_index
from mimir_fast.data.registry import register
from mimir_fast.data.sources.base import EncodedSource, MissingDataError, existing_root, hashes_of_places, state_of
from mimir_fast.data.sources.shard_names import split_of

_ADVICE = "a folder of parquet files called train-….parquet and validation-….parquet, or that folder's parent"
_GROUPS_KEPT = 16  # by each process: 180 MB of ImageNet
_LABELS = ("label", "labels", "cls", "class", "target")
_COLUMNS = ("file_ids", "groups", "rows", "labels")


class ParquetSource(EncodedSource):
    """Rows of parquet files.

    Args:
        column: the images' column.
        index: `file_ids`, `groups` and `rows` (within the group), each (N,) int64.
        block: rows of most groups.
    """

    window = _GROUPS_KEPT // 2  # a block may lie in two groups

    def __init__(self, files: list[Path], column: str, classes: list[str], index: Arrays, block: int) -> None:
        super().__init__("parquet", classes, index["labels"])
        self.files, self.column, self.block = files, column, block
        self.file_ids, self.groups, self.rows = (index[name] for name in _COLUMNS[:3])
        self._kept: OrderedDict[tuple[int, int], Any] = OrderedDict()

    def read(self, index: int) -> bytes:
        image = self._group(int(self.file_ids[index]), int(self.groups[index]))[int(self.rows[index])].as_py()
        content = image.get("bytes") if isinstance(image, dict) else image
        if not content:
            raise UnreadableImageError(f"{self.where(index)}: no bytes; images that are only named are not read")
        return content

    def _group(self, file: int, group: int) -> Any:
        key = file, group
        rows = self._kept.get(key)
        if rows is None:
            try:
                parquet = _pyarrow().parquet.ParquetFile(self.files[file])
                rows = parquet.read_row_group(group, columns=[self.column], use_threads=False)[self.column]
            except _pyarrow().ArrowException as error:
                raise UnreadableImageError(f"{self.files[file]}, row group {group}: {error}") from error
            self._kept[key] = rows
        with suppress(KeyError):  # another thread may have dropped it
            self._kept.move_to_end(key)
            while len(self._kept) > _GROUPS_KEPT:
                self._kept.popitem(last=False)
        return rows

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": OrderedDict()}

    def where(self, index: int) -> str:
        return f"{self.files[self.file_ids[index]]}, row {self.rows[index]} of row group {self.groups[index]}"

    def name_of(self, index: int) -> bytes:
        return f"{self.files[self.file_ids[index]].name} {self.groups[index]} {self.rows[index]}".encode()

    def state(self, index: int) -> bytes:
        return state_of(self.files[self.file_ids[index]]).encode()

    def stamp(self, index: int) -> bytes:
        return self.read(index)

    def identities(self) -> np.ndarray:
        names = [f"{path.name} {path.stat().st_size}" for path in self.files]
        return hashes_of_places(names, self.file_ids, self.groups, self.rows)


def build(config: DataConfig, split: str) -> ParquetSource:
    """The rows of the split's files; -1 is the label of rows without one, as in ImageNet's test split.

    Raises:
        ImportError: pyarrow is not installed.
        MissingDataError: no such files.
        ValueError: they have no images, or no whole parquet files.
    """
    root = existing_root(config.root, "parquet", _ADVICE)
    files = _files(root, split)
    train = files if split == "train" else _files(root, "train", wanted=False) or files
    try:
        column, label, names = _schema(train[0])

        def make() -> Arrays:
            parts = [_rows_of(number, path, label) for number, path in enumerate(files)]
            return {name: np.concatenate([part[name] for part in parts]) for name in _COLUMNS}

        index = kept_index(files[0].parent, f"{split}-parquet", lambda _: fingerprint_of(files), _COLUMNS, make)
    except _pyarrow().ArrowException as error:
        raise ValueError(f"{files[0].parent} holds a file that is no whole parquet file ({error})") from error
    if not names:
        counted = index if train is files else {"labels": np.concatenate([_labels(path, label) for path in train])}
        names = [str(number) for number in range(int(counted["labels"].max(initial=-1)) + 1)]
    sizes = Counter(Counter(zip(index["file_ids"].tolist(), index["groups"].tolist(), strict=True)).values())
    return ParquetSource(files, column, names, index, sizes.most_common(1)[0][0])


def _files(root: Path, split: str, wanted: bool = True) -> list[Path]:
    there = [root] if root.is_file() else sorted(path for path in root.rglob("*.parquet") if path.name[0] != ".")
    by_split = {name: [path for path in there if split_of(path) == name] for name in ("train", "val", "test", None)}
    found = by_split["train"] if split == "train" else by_split["val"] or by_split["test"]
    if split == "train" and len(by_split[None]) == len(there):
        found = there  # no name says a split: all are to train on
    if not found and wanted:
        raise MissingDataError(f"{root} has no parquet files of the {split} split: give --data.root {_ADVICE}")
    return found


def _schema(path: Path) -> tuple[str, str | None, list[str]]:
    """Column of the images, column of the labels, and the names of the classes as Hugging Face notes them."""
    schema = _pyarrow().parquet.read_schema(path)
    types = dict(zip(schema.names, schema.types, strict=True))
    images = [name for name, kind in types.items() if re.fullmatch(r"(large_)?binary|struct<.*bytes: .*>", str(kind))]
    if not images:
        raise ValueError(f"{path} has no column of images, but {', '.join(schema.names)}")
    column = next((name for name in ("image", "img", "jpg", "png") if name in images), images[0])
    label = next((name for name in _LABELS if name in types), None)
    about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    names = about.get("info", {}).get("features", {}).get(label, {}).get("names", []) if label else []
    return column, label, [str(name) for name in names]


def _rows_of(number: int, path: Path, label: str | None) -> Arrays:
    parquet = _pyarrow().parquet.ParquetFile(path).metadata
    sizes = np.array([parquet.row_group(group).num_rows for group in range(parquet.num_row_groups)], np.int64)
    groups = np.repeat(np.arange(len(sizes)), sizes)
    rows = np.arange(len(groups)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return {"file_ids": np.full(len(groups), number), "groups": groups, "rows": rows, "labels": _labels(path, label)}


def _labels(path: Path, label: str | None) -> np.ndarray:
    parquet = _pyarrow().parquet.ParquetFile(path)
    if label is None or label not in parquet.schema_arrow.names:
        return np.full(parquet.metadata.num_rows, -1, np.int64)
    column = parquet.read(columns=[label], use_threads=False)[label]
    if not str(column.type).startswith(("int", "uint")):
        raise ValueError(f"{path}: the column {label} holds {column.type}, wanted numbers of classes")
    return np.maximum(column.fill_null(-1).to_numpy().astype(np.int64), -1)


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("source 'parquet' needs the library: pip install pyarrow") from error
    return pyarrow


register("parquet", build)
