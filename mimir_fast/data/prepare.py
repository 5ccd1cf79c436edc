"""Turn a data set into shards that are fast to read: python -m mimir_fast.data.prepare SOURCE OUT

    python -m mimir_fast.data.prepare /data/imagenet /fast/imagenet --format raw          # 256 pixels, uint8, mapped
    python -m mimir_fast.data.prepare /data/imagenet /big/imagenet --format webdataset    # tar files of JPEG files
    python -m mimir_fast.data.prepare /data/imagenet /fast/imagenet --verify              # are they as written?
    torchrun … -m mimir_fast.pretrain --data.source raw --data.root /fast/imagenet …

raw: images are decoded and their short side is brought down to `short_side` once; training then copies crops out of
mapped memory instead of decoding JPEG files (ImageNet at 256 pixels: about 340 GB). webdataset: the files as they are
(or, with --short_side, resized and written as JPEG of quality 95), a thousand or so in a tar file.

Training samples are mixed before they are written, so that neighbours are of different classes. A shard is written
aside, synced and renamed, with a note of its size and checksum; started again after a kill, the command goes on with
the shards that are not there. Files that cannot be read are left out, counted, and listed in OUT/<split>.json.
"""

import fcntl
import multiprocessing
import os
import re
import shlex
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from mimir_fast._tyro import tyro
from mimir_fast.cli import parse, run
from mimir_fast.data.config import DataConfig
from mimir_fast.data.index import write_whole
from mimir_fast.data.loaders.skip import TooManyBadFilesError
from mimir_fast.data.manifest import TABLE, Manifest, Shard, check_sizes, read_manifest
from mimir_fast.data.order import shuffled
from mimir_fast.data.shard_files import Job, ShardNote, checksum, read_note, write_shard
from mimir_fast.data.sources import build_source
from mimir_fast.data.sources.base import ImageSource, MissingDataError
from mimir_fast.extensions import Imports, load_extensions
from mimir_fast.validation import check_number, counted, without

_PARTIAL = re.compile(r"\.(\.?(train|test))\b.*\.\d+\.partial")  # as `write_whole` names it
_ADVICE = "run the command that wrote it again; it goes on where it was"


@dataclass
class PrepareConfig:
    """What to read, where to write it, and how."""

    source: Annotated[str, tyro.conf.Positional]
    """root of the data set, as --data.root of training: a folder with train/<class>/ and val/<class>/"""
    out: Annotated[str, tyro.conf.Positional]
    """folder for the shards; about 200 KB an image (raw at 256 pixels)"""
    format: Literal["raw", "webdataset"] = "raw"
    """raw: uint8 pixels to be mapped into memory, the fastest; webdataset: tar files, a tenth of the size"""
    source_format: str = "folder"
    """how SOURCE is read: any name of --data.source"""
    splits: tuple[str, ...] = ("train", "test")
    """which splits; those that SOURCE lacks are left out if there is another"""
    short_side: int | None = None
    """larger images are resized (bicubic, antialiased) to this short side; raw: 256; webdataset: files as they are"""
    channels: Literal[1, 3] = 3
    """of raw images: 3 RGB, 1 grey"""
    images_per_shard: int = 1000
    """images in a file"""
    num_workers: int = os.cpu_count() or 1
    """processes"""
    max_bad_files: int = 1000
    """unreadable files that are left out before the command stops"""
    seed: int = 0
    """of the order in which training samples are written"""
    verify: bool = False
    """write nothing: compare sizes and checksums of what OUT holds with what was written"""
    imports: Imports = ()
    """module that registers the source of --source_format"""

    def __post_init__(self) -> None:
        for name, least in (("images_per_shard", 1), ("num_workers", 1), ("max_bad_files", 0), ("seed", 0)):
            check_number(name, getattr(self, name), at_least=least)
        if self.short_side is not None and self.short_side < 1:
            raise ValueError(
                f"short_side must be at least 1 pixel, got {self.short_side}; leave it out for the default"
            )
        if unknown := set(self.splits) - {"train", "test"}:
            raise ValueError(f"splits must be train and test, got {', '.join(sorted(unknown))}")

    def idle(self) -> dict[str, str]:
        """Options that do nothing as the others are."""
        return without(self.format == "raw", "--format is not raw", "channels")

    @property
    def side(self) -> int | None:
        """Short side of the images written; None leaves the files alone."""
        return 256 if self.short_side is None and self.format == "raw" else self.short_side


def prepare(config: PrepareConfig) -> dict[str, Manifest]:
    """Write all shards that are not there yet; split → what was written.

    Raises:
        MissingDataError: SOURCE has none of the splits.
        ValueError: OUT holds shards of something else, or no image could be read.
        TooManyBadFilesError: more than `max_bad_files`; what was written stays.
    """
    sources: dict[str, ImageSource] = {}
    missing: list[MissingDataError] = []
    data = DataConfig(source=config.source_format, root=config.source)
    for split in config.splits:
        try:
            sources[split] = build_source(data, split)
        except MissingDataError as error:
            missing.append(error)
    if not sources:
        raise missing[0]
    out = Path(config.out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing to {out}: wait for it, or give another folder") from None
        for leftover in [*out.glob(".*.partial"), *out.glob(".notes/.*.partial")]:  # of a command that was killed
            if _PARTIAL.fullmatch(leftover.name):
                leftover.unlink()
        return {split: _prepare_split(config, source, split) for split, source in sources.items()}


def _prepare_split(config: PrepareConfig, source: ImageSource, split: str) -> Manifest:
    out = Path(config.out).expanduser()
    settings = {
        "source": str(Path(config.source).expanduser().resolve()), "source_format": config.source_format,
        "split": split, "samples": len(source), "short_side": config.side, "images_per_shard": config.images_per_shard,
        "seed": config.seed,
    }  # fmt: skip
    manifest = Manifest(config.format, settings, config.channels, list(source.classes))
    _claim(out, split, manifest)
    order = np.arange(len(source))
    if split == "train":
        order = shuffled(order, len(source), config.seed, 0)
    cuts = range(0, len(source), config.images_per_shard)
    jobs = [
        Job(out, split, number, config.format, order[start : start + config.images_per_shard], config.side,
            config.channels)
        for number, start in enumerate(cuts)
    ]  # fmt: skip
    notes = _run(jobs, source, config)
    for note in notes:
        manifest.shards.append(Shard(note.file, len(note), note.bytes, note.crc32))
        manifest.skipped |= note.skipped
    if manifest.num_images == 0:
        raise ValueError(f"of {counted(len(source), 'file')} of {config.source} ({split}) none can be read as an image")
    if config.format == "raw":
        _write_table(out / f"{split}.npz", notes)
    manifest.write(out / f"{split}.json")
    return manifest


def _claim(out: Path, split: str, manifest: Manifest) -> None:
    """Settle whose shards these are: those of another source or other settings are never mixed or overwritten."""
    path = out / f".{split}.settings.json"
    if path.is_file():
        before = read_manifest(path, "remove it, with the shards beside it, to begin anew")
        ours, theirs = (
            {"format": each.format, "channels": each.channels, **each.settings} for each in (manifest, before)
        )
        if different := [name for name in ours if ours[name] != theirs.get(name)]:
            what = ", ".join(f"{name} = {theirs.get(name)} (now {ours[name]})" for name in different)
            raise ValueError(f"{out} holds shards prepared with {what}: give another folder, or empty this one")
        return
    names = (f"{split}-", f"{split}.json", f"{split}.npz")
    if strange := sorted(entry.name for entry in out.iterdir() if entry.name.startswith(names)):
        raise ValueError(f"{out} holds {strange[0]}, which this command did not write: give another folder")
    manifest.write(path)


def _run(jobs: list[Job], source: ImageSource, config: PrepareConfig) -> list[ShardNote]:
    """The notes of all shards; those that are not there are written, several at a time."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    notes = {job.number: note for job in jobs if (note := read_note(job)) is not None}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task(f"{jobs[0].split}: images", total=len(source))
        progress.advance(bar, sum(len(job.samples) for job in jobs if job.number in notes))
        context = multiprocessing.get_context("fork")  # the source is shared, not sent
        with ProcessPoolExecutor(config.num_workers, context, initializer=_share, initargs=(source,)) as pool:
            begun = {pool.submit(_write, job): job for job in jobs if job.number not in notes}
            try:
                for future in as_completed(begun):
                    notes[begun[future].number] = future.result()
                    progress.advance(bar, len(begun[future].samples))
                    _check_skipped(list(notes.values()), config)
            except BrokenProcessPool as error:
                raise OSError(
                    "a process was killed (out of memory? give fewer --num_workers); the same command goes on from here"
                ) from error
            finally:
                pool.shutdown(cancel_futures=True)
    _check_skipped(list(notes.values()), config)
    return [notes[job.number] for job in jobs]


def _check_skipped(notes: list[ShardNote], config: PrepareConfig) -> None:
    skipped = [reason for note in notes for reason in note.skipped.values()]
    if len(skipped) > config.max_bad_files:
        raise TooManyBadFilesError(
            f"{len(skipped)} unreadable files in {config.source}, more than max_bad_files = {config.max_bad_files}: "
            f"repair them, or raise --max_bad_files; the first: {'; '.join(skipped[:3])}"
        )


_SOURCE: list[ImageSource] = []  # of a worker process


def _share(source: ImageSource) -> None:
    import torch

    torch.set_num_threads(1)  # a forked process cannot use its parent's OpenMP threads: it would hang
    _SOURCE[:] = [source]


def _write(job: Job) -> ShardNote:
    return write_shard(job, _SOURCE[0])


def _write_table(path: Path, notes: list[ShardNote]) -> None:
    columns: dict[str, Any] = {
        "shard_ids": np.repeat(np.arange(len(notes)), [len(note) for note in notes]),
        **{name: np.concatenate([note.columns[name] for note in notes]) for name in TABLE if name != "shard_ids"},
    }

    def write(aside: Path) -> None:
        with aside.open("wb") as file:
            np.savez(file, **columns)

    write_whole(path, write)


def verify(config: PrepareConfig) -> list[str]:
    """What is wrong with the prepared shards: one line for each, none if all are as they were written.

    Raises:
        MissingDataError: nothing was prepared.    ValueError: a manifest is damaged.
    """
    out = Path(config.out).expanduser()
    paths = [out / f"{split}.json" for split in config.splits if (out / f"{split}.json").is_file()]
    found = [read_manifest(path, _ADVICE) for path in paths or [out / "train.json"]]
    faults = []
    for manifest in found:
        whole = []
        for shard in manifest.shards:
            try:
                check_sizes(replace(manifest, shards=[shard]), out, _ADVICE)
                whole.append(shard)
            except ValueError as error:
                faults.append(str(error))
        with ProcessPoolExecutor(config.num_workers, multiprocessing.get_context("fork")) as pool:
            sums = pool.map(checksum, [out / shard.file for shard in whole])
            for shard, value in zip(whole, sums, strict=True):
                if value != shard.crc32:
                    faults.append(
                        f"{out / shard.file} has another content than was written (crc32 {value:08x}, written "
                        f"{shard.crc32:08x}): remove it and {_ADVICE}"
                    )
    return faults


def main() -> None:
    """The command; shards that fail --verify are exit code 1."""
    load_extensions(sys.argv[1:])
    config = parse(PrepareConfig, prog="python -m mimir_fast.data.prepare")
    if config.verify:
        faults = verify(config)
        print("\n".join(faults) or f"{config.out}: all shards are as they were written")
        raise SystemExit(bool(faults))
    for split, manifest in prepare(config).items():
        print(
            f"{split}: {counted(manifest.num_images, 'image')} in {counted(len(manifest.shards), 'shard')}, "
            f"{counted(len(manifest.skipped), 'file')} left out"
            + (f" ({config.out}/{split}.json lists them)" if manifest.skipped else "")
        )
    print(f"next: --data.source {config.format} --data.root {shlex.quote(str(config.out))}")


if __name__ == "__main__":
    run(main)
