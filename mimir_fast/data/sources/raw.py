"""Prepared uint8 images: shards that `mimir_fast.data.prepare --format raw` wrote, mapped into memory.

Opening a split reads its manifest, maps its table and asks for the size of each shard; no image is read, and the ranks
of a machine share one copy in the page cache. (A shard that is cut while it is in use ends the process: SIGBUS.)
"""

from contextlib import suppress

import numpy as np

from mimir_fast.data.config import DataConfig
from mimir_fast.data.manifest import TABLE, check_classes, check_sizes, read_manifest
from mimir_fast.data.npz import MissingArrayError, map_member
from mimir_fast.data.registry import register
from mimir_fast.data.sources.base import RawSource, existing_root

ADVICE = "python -m mimir_fast.data.prepare SOURCE_FOLDER OUT --format raw, then --data.source raw --data.root OUT"


def build(config: DataConfig, split: str) -> RawSource:
    """The prepared split under `config.root`.

    Raises:
        MissingDataError: it was not prepared.
        ValueError: a shard is missing or cut, the table does not fit the shards, or another version wrote them.
    """
    root = existing_root(config.root, "raw", ADVICE)
    manifest = read_manifest(root / f"{split}.json", ADVICE)
    if manifest.format != "raw":
        raise ValueError(f"{root} holds {manifest.format} shards: give --data.source {manifest.format}")
    check_classes(root, split, manifest.classes, ADVICE)
    check_sizes(manifest, root, ADVICE)
    path = root / f"{split}.npz"
    try:
        columns = {name: map_member(path, name) for name in TABLE}
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}); make it anew: {ADVICE}") from error
    labels = columns.pop("labels")
    table = {name: columns[name] for name in ("shard_ids", "offsets", "heights", "widths")}
    with suppress(MissingArrayError):  # of an older version
        table["contents"] = map_member(path, "contents")
    counts = [shard.images for shard in manifest.shards]
    ends = table["offsets"] + table["heights"].astype(np.int64) * table["widths"] * manifest.channels
    sizes = np.array([shard.bytes for shard in manifest.shards])
    whole = len(labels) == sum(counts) and (np.repeat(np.arange(len(counts)), counts) == table["shard_ids"]).all()
    if not whole or (ends > sizes[table["shard_ids"]]).any() or min(map(np.min, table.values())) < 0:
        raise ValueError(f"{path} does not fit the shards beside it; make it anew: {ADVICE}")
    files = [root / shard.file for shard in manifest.shards]
    return RawSource("raw", manifest.classes, labels, files, table, manifest.channels)


register("raw", build)
