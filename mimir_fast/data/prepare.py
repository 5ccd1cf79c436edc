"""Turn a data set into shards that are fast to read: python -m mimir_fast.data.prepare SOURCE OUT

    python -m mimir_fast.data.prepare /data/imagenet /fast/imagenet --format raw          # 256 pixels, uint8, mapped
    python -m mimir_fast.data.prepare /data/imagenet /big/imagenet --format webdataset    # tar files of JPEG files
    python -m mimir_fast.data.prepare /data/imagenet /fast/imagenet --verify              # are they as written?
    torchrun … -m mimir_fast.pretrain --data.source raw --data.root /fast/imagenet …

raw: images are decoded and their short side is brought down to `short_side` once; training then copies crops out of
mapped memory instead of decoding JPEG files (ImageNet at 256 pixels: about 340 GB). webdataset: the files as they are
(or, with --short_side, resized and written as JPEG of quality 95), a thousand or so in a tar file.

Training samples are mixed before they are written, so that neighbours are of different classes. A shard is written
aside, synced and renamed, with a note of its size and checksum and of the files in it; started again, after a kill or
after files of SOURCE have changed, the command writes the shards that are not there or not of these files. Files that
cannot be read are left out, counted, and listed in OUT/<split>.json.
"""

import fcntl
import multiprocessing
import re
import shlex
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from mimir_fast.checkpoints.durable import write_whole
from mimir_fast.cli import parse, run
from mimir_fast.data.loaders.skip import TooManyBadFilesError
from mimir_fast.data.manifest import Manifest, Shard, check_classes, read_manifest
from mimir_fast.data.prepare_config import ADVICE, PrepareConfig, jobs_of, sources_of
from mimir_fast.data.shard_files import Job, ShardNote, changed_since, read_note, write_shard
from mimir_fast.data.sources.base import ImageSource
from mimir_fast.data.sources.files import FileSource
from mimir_fast.data.verify import verify
from mimir_fast.extensions import load_extensions
from mimir_fast.validation import counted

_PARTIAL = re.compile(r"\.(\.?(train|test))\b.*\.\d+\.partial")  # as `write_whole` names it


def prepare(config: PrepareConfig) -> dict[str, Manifest]:
    """Write all shards that are not there yet; split → what was written.

    Raises:
        MissingDataError: SOURCE has none of the splits.
        ValueError: OUT is SOURCE, it holds shards of something else, or no image could be read.
        TooManyBadFilesError: more than `max_bad_files`; what was written stays.
    """
    out = Path(config.out).expanduser()
    sources = sources_of(config)
    _check_apart(config, sources)
    for split, source in sources.items():
        if set(sources) != {"train", "test"}:  # else both are written anew
            check_classes(out, split, list(source.classes), ADVICE)
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


def _check_apart(config: PrepareConfig, sources: dict[str, ImageSource]) -> None:
    """Shards among the images they are made of would be read as data, or replace them."""
    out, root = (Path(name).expanduser().resolve() for name in (config.out, config.source))
    folders = [source.root.resolve() for source in sources.values() if isinstance(source, FileSource)]
    if inside := [root] * (out == root) + [folder for folder in folders if out.is_relative_to(folder)]:
        raise ValueError(f"OUT {out} lies where SOURCE is read from ({inside[0]}): give a folder of its own")


def _prepare_split(config: PrepareConfig, source: ImageSource, split: str) -> Manifest:
    out = Path(config.out).expanduser()
    settings = {
        "source": str(Path(config.source).expanduser().resolve()), "source_format": config.source_format,
        "split": split, "samples": len(source), "short_side": config.side, "images_per_shard": config.images_per_shard,
        "seed": config.seed,
    }  # fmt: skip
    manifest = Manifest(config.format, settings, config.channels, list(source.classes))
    _claim(out, split, manifest)
    notes = _run(jobs_of(config, source, split), source, config, out / f"{split}.json")
    for note in notes:
        manifest.shards.append(Shard(note.file, len(note), note.bytes, note.crc32))
        manifest.skipped |= note.skipped
    if manifest.num_images == 0:
        raise ValueError(f"of {counted(len(source), 'file')} of {config.source} ({split}) none can be read as an image")
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


def _run(jobs: list[Job], source: ImageSource, config: PrepareConfig, manifest: Path) -> list[ShardNote]:
    """The notes of all shards; those that are not there, or not of these files, are written, several at a time."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    notes = {job.number: note for job in jobs if (note := read_note(job)) is not None}
    stale = {job.number: which for job in jobs if (which := changed_since(notes.get(job.number), job, source))}
    if stale:
        manifest.unlink(missing_ok=True)  # until all shards are of the same files
        print(
            f"{jobs[0].split}: {counted(len(stale), 'shard')} made again, for their files have changed since, first "
            f"{next(iter(stale.values()))}", file=sys.stderr,
        )  # fmt: skip
        notes = {number: note for number, note in notes.items() if number not in stale}
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
        **{name: np.concatenate([note.columns[name] for note in notes]) for name in notes[0].columns},
    }

    def write(aside: Path) -> None:
        with aside.open("wb") as file:
            np.savez(file, **columns)

    write_whole(path, write)


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
