"""Whether prepared shards are as they were written, and of the files that their source has now."""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from mimir_fast.data.manifest import Manifest, check_sizes, read_manifest
from mimir_fast.data.prepare_config import ADVICE, PrepareConfig, jobs_of, sources_of
from mimir_fast.data.shard_files import changed_since, checksum, read_note
from mimir_fast.data.sources.base import MissingDataError
from mimir_fast.validation import counted


def verify(config: PrepareConfig) -> list[str]:
    """What is wrong with the prepared shards: one line for each, none if all are as they were written.

    Raises:
        MissingDataError: nothing was prepared.    ValueError: a manifest is damaged.
    """
    out = Path(config.out).expanduser()
    paths = [out / f"{split}.json" for split in config.splits if (out / f"{split}.json").is_file()]
    found = [read_manifest(path, ADVICE) for path in paths or [out / "train.json"]]
    faults = []
    for manifest in found:
        whole = []
        for shard in manifest.shards:
            try:
                check_sizes(replace(manifest, shards=[shard]), out, ADVICE)
                whole.append(shard)
            except ValueError as error:
                faults.append(str(error))
        with ProcessPoolExecutor(config.num_workers, get_context("fork")) as pool:
            sums = pool.map(checksum, [out / shard.file for shard in whole])
            for shard, value in zip(whole, sums, strict=True):
                if value != shard.crc32:
                    faults.append(
                        f"{out / shard.file} has another content than was written (crc32 {value:08x}, written "
                        f"{shard.crc32:08x}): remove it and {ADVICE}"
                    )
    return faults + _changed_files(config, {manifest.settings.get("split"): manifest for manifest in found})


def _changed_files(config: PrepareConfig, found: dict[Any, Manifest]) -> list[str]:
    """A line for each split whose shards are not of the files that SOURCE has now; none if SOURCE is not here."""
    try:
        sources = sources_of(config)
    except MissingDataError:
        return []
    faults = []
    for split, manifest in found.items():
        if (source := sources.get(split)) is None:
            continue
        if list(source.classes) != manifest.classes:
            faults.append(f"{split}: SOURCE has other classes than were prepared; {ADVICE}")
        asked = replace(config, images_per_shard=manifest.settings["images_per_shard"], format=manifest.format,  # type: ignore[arg-type]
                        seed=manifest.settings["seed"])  # fmt: skip
        jobs = jobs_of(asked, source, split)
        changed = [which for job in jobs if (which := changed_since(read_note(job), job, source))]
        if changed or len(source) != manifest.settings["samples"]:
            what = f"in {counted(len(changed), 'shard')}, first {changed[0]}" if changed else f"{len(source)} now"
            faults.append(f"{split}: SOURCE has other files than were prepared, {what}; {ADVICE}")
    return faults
