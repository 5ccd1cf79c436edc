"""Prepared shards: what is written, what is read back, killed and gone on with, damaged and refused."""

import json
import shutil
import time
import zlib
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run_module, start_module
from PIL import Image

from mimir_fast.data import DataConfig, build_loader, build_source
from mimir_fast.data.loaders.raw import RawLoader
from mimir_fast.data.loaders.skip import TooManyBadFilesError
from mimir_fast.data.prepare import prepare
from mimir_fast.data.prepare_config import PrepareConfig
from mimir_fast.data.sources import MissingDataError, RawSource
from mimir_fast.data.verify import verify


def config_for(folder, out, **options) -> PrepareConfig:
    return PrepareConfig(
        str(folder), str(out), **{"images_per_shard": 7, "num_workers": 2, "short_side": 64, **options}
    )


def raw(out, **options) -> DataConfig:
    return DataConfig(
        **{"source": "raw", "root": str(out), "image_size": 48, "augment": "resized_crop", "num_workers": 0, **options}
    )


@pytest.fixture
def prepared(image_folder, tmp_path):
    """The folder of digits and photographs as raw shards of 64 pixels."""
    out = tmp_path / "prepared"
    prepare(config_for(image_folder, out))
    return out


def test_raw_shards_hold_every_image_once_with_its_label(image_folder, prepared):
    folder = build_source(DataConfig(source="folder", root=str(image_folder)), "train")
    source = build_source(raw(prepared), "train")
    assert isinstance(source, RawSource) and len(source) == 25 and source.classes == folder.classes
    names = np.load(prepared / "train.npz")["names"]
    originals = {folder.where(index): index for index in range(len(folder))}
    assert {name.decode() for name in names} == set(originals)
    for index, name in enumerate(names):
        original = originals[name.decode()]
        picture = Image.fromarray(folder.pixels(original))
        short = min(picture.size)
        wanted = picture.resize((picture.width * 64 // short, picture.height * 64 // short), Image.Resampling.BICUBIC)
        assert (source.pixels(index) == np.asarray(wanted)).all()
        assert source.labels[index] == folder.labels[original]
    assert source.labels.tolist() != sorted(source.labels.tolist())  # mixed before they were written
    assert (build_source(raw(prepared), "test").labels == build_source(replace_root(image_folder), "test").labels).all()


def replace_root(folder) -> DataConfig:
    return DataConfig(source="folder", root=str(folder))


def test_webdataset_shards_hold_the_files_as_they_are(image_folder, tmp_path):
    import webdataset

    out = tmp_path / "tars"
    prepare(config_for(image_folder, out, format="webdataset", short_side=None))
    folder = build_source(replace_root(image_folder), "train")
    source = build_source(DataConfig(source="webdataset", root=str(out)), "train")
    by_content = {folder.read(index): folder.labels[index] for index in range(len(folder))}
    assert len(source) == 25
    assert all(by_content[source.read(index)] == source.labels[index] for index in range(25))
    theirs = list(webdataset.WebDataset(str(out / "train-000000.tar"), shardshuffle=False).decode("rgb8"))
    assert len(theirs) == 7 and theirs[0]["jpg"].dtype == np.uint8  # another library reads them, too
    smaller = tmp_path / "small"
    prepare(config_for(image_folder, smaller, format="webdataset", short_side=32, splits=("test",)))
    source = build_source(DataConfig(source="webdataset", root=str(smaller)), "test")
    assert all(min(source.pixels(index).shape[:2]) == 32 for index in range(len(source)))


def test_the_raw_loader_cuts_what_the_worker_loader_cuts(prepared):
    """By one fused op both; only where the pixels come from differs."""
    for split, augment in (("train", "resized_crop"), ("train", "pad_crop"), ("test", "none")):
        batches = {}
        for loader in ("raw", "torch"):
            data = build_loader(raw(prepared, loader=loader, augment=augment), split=split, batch_size=8, seed=3)
            batches[loader] = list(islice(data, 4))
        for ours, theirs in zip(batches["raw"], batches["torch"], strict=True):
            assert torch.equal(ours.samples, theirs.samples) and torch.equal(ours.labels, theirs.labels)
            assert ours.images.shape[1:] == (3, 48, 48) and ours.images.float().std() > 20
            assert torch.equal(ours.images, theirs.images)


def test_threads_change_nothing_and_resuming_is_exact(prepared):
    def take(count, state=None, **options):
        loader = build_loader(raw(prepared, **options), split="train", batch_size=4, seed=5)
        assert isinstance(loader, RawLoader)  # `auto` chose it
        if state:
            loader.load_state_dict(state)
        batches = list(islice(loader, count))
        state = loader.state_dict()
        loader.close()
        return batches, state

    whole, _ = take(12)
    _, state = take(5, num_workers=3)
    rest, _ = take(7, state, num_workers=2)
    for first, second in zip(whole[5:], rest, strict=True):
        assert torch.equal(first.images, second.images) and torch.equal(first.samples, second.samples)
    assert sorted(torch.cat([batch.samples for batch in whole]).tolist()[:25]) == list(range(25))


def test_grey_and_a_part_of_the_images(image_folder, tmp_path, prepared):
    prepare(config_for(image_folder, tmp_path / "grey", channels=1, splits=("test",)))
    for out, channels in ((tmp_path / "grey", 3), (prepared, 1)):
        (batch,) = build_loader(raw(out, channels=channels), split="test", batch_size=8)
        assert batch.images.shape == (8, channels, 48, 48)
    assert len(build_source(raw(prepared, limit=6), "train")) == 6
    part, whole = build_source(raw(prepared, limit=5), "train"), build_source(raw(prepared), "train")
    assert (part.pixels(4) == whole.pixels(20)).all() and part.where(4) == whole.where(20)


def test_bad_files_are_left_out_and_listed(damaged_folder, tmp_path):
    manifest = prepare(config_for(damaged_folder, tmp_path / "out"))["train"]
    assert manifest.num_images == 25
    assert sorted(path.rsplit("/", 1)[1] for path in manifest.skipped) == ["cut.jpg", "notes.jpg", "zero.jpg"]
    assert json.loads((tmp_path / "out" / "train.json").read_text())["skipped"] == manifest.skipped
    with pytest.raises(TooManyBadFilesError, match=r"[23] unreadable files.*max_bad_files = 1.*--max_bad_files"):
        prepare(config_for(damaged_folder, tmp_path / "less", max_bad_files=1))


def test_finished_shards_are_kept_and_damaged_ones_made_again(image_folder, prepared):
    shard = prepared / "train-000001.bin"
    contents = {path.name: path.read_bytes() for path in prepared.glob("*.bin")}
    ages = {path.name: path.stat().st_mtime_ns for path in prepared.glob("*.bin")}
    shard.write_bytes(shard.read_bytes()[:-5])
    prepare(config_for(image_folder, prepared))
    assert {path.name: path.read_bytes() for path in prepared.glob("*.bin")} == contents
    changed = {path.name for path in prepared.glob("*.bin") if path.stat().st_mtime_ns != ages[path.name]}
    assert changed == {shard.name}


def test_killed_at_any_moment_it_goes_on(image_folder, tmp_path):
    """kill -9 of the command and its processes, a few times; the end is as if nothing had happened."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    options = ["--images_per_shard", "2", "--num_workers", "1", "--short_side", "64"]
    prepare(config_for(image_folder, whole, images_per_shard=2, num_workers=1))
    command = ["mimir_fast.data.prepare", str(image_folder), str(out), *options]
    kills = 0
    for wanted in (1, 5, 9):  # shards that must be there before the kill
        process = start_module(tmp_path, *command)
        while process.poll() is None and len(list(out.glob("*.bin"))) < wanted:
            time.sleep(0.002)
        kills += process.poll() is None
        process.kill()
        process.wait(60)
    assert kills
    assert run_module(tmp_path, *command).returncode == 0
    for path in whole.iterdir():
        if path.suffix in (".bin", ".json"):
            assert (out / path.name).read_bytes() == path.read_bytes()
    assert not list(out.glob("**/*.partial"))


def test_verify_names_what_is_wrong(image_folder, prepared):
    config = config_for(image_folder, prepared, verify=True)
    assert verify(config) == []
    first, second, third = sorted(prepared.glob("train-*.bin"))[:3]
    content = bytearray(first.read_bytes())
    content[1000] ^= 1  # one bit of one pixel
    first.write_bytes(content)
    second.write_bytes(second.read_bytes()[:-1])
    third.unlink()
    faults = verify(config)
    assert len(faults) == 3
    assert f"{first} has another content" in faults[2] and "1 bytes" not in faults[0]
    assert str(second) in faults[0] and f"{third} is missing" in faults[1]
    result = run_module(prepared, "mimir_fast.data.prepare", str(image_folder), str(prepared), "--verify")
    assert result.returncode == 1 and "is missing" in result.stdout


def test_damaged_shards_are_refused_at_the_start(prepared, tmp_path):
    def fails(message, kind=ValueError):
        with pytest.raises(kind, match=message):
            build_source(raw(prepared), "train")

    shard, manifest, table = (prepared / name for name in ("train-000000.bin", "train.json", "train.npz"))
    whole, text, columns = shard.read_bytes(), manifest.read_text(), table.read_bytes()
    shard.write_bytes(whole[:-1])
    fails(r"train-000000\.bin has \d+ bytes, \d+ were written: copy it again")
    shard.unlink()
    fails(r"train-000000\.bin is missing")
    shard.write_bytes(whole)
    for bad, message in (
        (text[: len(text) // 2], "is not a manifest"),
        ("[]", "is not a manifest"),
        (text.replace('"version": 1', '"version": 2'), "version 2, this mimir_fast reads version 1"),
        (text.replace("train-000000.bin", "../train-000000.bin"), "no file in its folder; refused"),
        (text.replace("train-000000.bin", "/etc/passwd"), "no file in its folder; refused"),
        (text.replace('"format": "raw"', '"format": "webdataset"'), "give --data.source webdataset"),
    ):
        manifest.write_text(bad)
        fails(message)
    manifest.write_text(text)
    table.write_bytes(columns[: len(columns) // 2])
    fails("is not a whole npz file")
    moved = dict(np.load(prepared / "test.npz"))
    np.savez(table, **moved)
    fails("does not fit the shards")
    arrays = {**dict(np.load(shutil.copy(prepared / "test.npz", tmp_path / "x.npz")))}
    del arrays["heights"]
    np.savez(table, **arrays)
    fails("no array 'heights'")
    table.unlink()
    fails("cannot be read")
    manifest.unlink()
    fails(r"was not .completely. prepared", MissingDataError)


def test_a_foreign_folder_and_other_settings_are_left_alone(image_folder, prepared, tmp_path):
    with pytest.raises(ValueError, match=r"short_side = 64 \(now 32\).*another folder"):
        prepare(config_for(image_folder, prepared, short_side=32))
    with pytest.raises(ValueError, match=r"format = raw \(now webdataset\)"):
        prepare(config_for(image_folder, prepared, format="webdataset"))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "train-000000.bin").write_bytes(b"precious")
    with pytest.raises(ValueError, match="which this command did not write"):
        prepare(config_for(image_folder, tmp_path / "theirs"))
    assert (tmp_path / "theirs" / "train-000000.bin").read_bytes() == b"precious"
    with pytest.raises(MissingDataError, match=r"was not .completely. prepared"):
        build_source(raw(image_folder), "train")


def test_bad_requests_are_one_line(image_folder, tmp_path):
    def run(*arguments):
        return run_module(tmp_path, "mimir_fast.data.prepare", *map(str, arguments))

    for arguments, message in (
        ((tmp_path / "nowhere", tmp_path / "out"), "does not exist"),
        ((image_folder, tmp_path / "out", "--images_per_shard", "0"), "images_per_shard=0, wanted at least 1"),
        ((image_folder, tmp_path / "never", "--verify"), "was not (completely) prepared"),
        ((image_folder, "/proc/nowhere/out"), "No such file"),
    ):
        result = run(*arguments)
        assert result.returncode == 2 and message in result.stderr, result.stderr
        assert "Traceback" not in result.stderr


def test_what_does_not_go_together_is_refused(image_folder, prepared):
    with pytest.raises(ValueError, match=r"mimir_fast\.data\.prepare"):
        build_loader(replace(raw(image_folder), source="folder", loader="raw"), split="train", batch_size=2)
    with pytest.raises(ValueError, match="decodes image files"):
        build_loader(raw(prepared, loader="dali"), split="train", batch_size=2)


@pytest.mark.parametrize("name", ["train.json", "train.npz", "train-notes.txt"])
def test_other_files_in_the_folder_are_not_touched(image_folder, tmp_path, name):
    (tmp_path / name).write_text("mine")
    (tmp_path / ".film.partial").write_text("a browser's")
    with pytest.raises(ValueError, match=f"{name}, which this command did not write: give another folder"):
        prepare(config_for(image_folder, tmp_path))
    assert (tmp_path / name).read_text() == "mine" and (tmp_path / ".film.partial").exists()


@pytest.mark.parametrize("format", ["raw", "webdataset"])
def test_shards_follow_their_files(image_folder, tmp_path, format, capfd):
    """A class renamed, an image replaced, one repaired: the shards that hold it are made again, the others kept."""
    config = config_for(image_folder, tmp_path / "out", format=format, images_per_shard=5, num_workers=1)

    def shards():
        return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*-*.*")}

    prepare(config)
    first = shards()
    (image_folder / "train" / "digit_1").rename(image_folder / "train" / "a_one")
    (image_folder / "val" / "digit_1").rename(image_folder / "val" / "a_one")
    assert any("other classes" in fault for fault in verify(config))
    assert any("train: SOURCE has other files than were prepared, in 5 shards" in fault for fault in verify(config))
    prepare(config)
    assert "train: 5 shards made again, for their files have changed since, first " in capfd.readouterr().err
    assert verify(config) == [] and all(shards()[name] > first[name] for name in first)
    source = build_source(DataConfig(source=format, root=str(tmp_path / "out")), "train")
    table = dict(np.load(tmp_path / "out" / "train.npz"))
    assert source.classes == ("a_one", "digit_0", "digit_2")
    assert all(
        source.classes[label] in name.decode() for label, name in zip(source.labels, table["names"], strict=True)
    )
    assert all(zlib.crc32(Path(name.decode()).read_bytes()) == value
               for name, value in zip(table["names"], table["contents"], strict=True))  # fmt: skip

    victim, second = image_folder / "train" / "digit_0" / "000.jpg", shards()
    content = victim.read_bytes()
    victim.write_bytes(content)  # touched, with the same content
    prepare(config)
    assert shards() == second and verify(config) == []
    changed = bytearray(content)
    changed[len(content) // 2] ^= 1  # of the same size
    victim.write_bytes(changed)
    assert [fault for fault in verify(config) if "in 1 shard, first" in fault and str(victim) in fault]
    prepare(config)
    assert sum(second[name] != age for name, age in shards().items()) == 1 and verify(config) == []


def test_a_file_that_was_repaired_comes_in(damaged_folder, tmp_path):
    config = config_for(damaged_folder, tmp_path / "out", num_workers=1)
    assert len(prepare(config)["train"].skipped) == 3
    good = (damaged_folder / "train" / "digit_0" / "china.jpg").read_bytes()
    (damaged_folder / "train" / "digit_1" / "zero.jpg").write_bytes(good)
    assert len(prepare(config)["train"].skipped) == 2


@pytest.mark.parametrize("format", ["raw", "webdataset"])
def test_splits_of_two_states_of_the_source_are_not_mixed(image_folder, tmp_path, format):
    config = config_for(image_folder, tmp_path / "out", format=format, splits=("train",), num_workers=1)
    prepare(config)
    for split in ("train", "val"):
        (image_folder / split / "digit_1").rename(image_folder / split / "a_one")
    with pytest.raises(
        ValueError, match=r"test has the classes 3 \(a_one, .*train was prepared when they were 3 \(dig"
    ):
        prepare(replace(config, splits=("test",)))
    assert not (tmp_path / "out" / "test.json").exists()
    elsewhere = replace(config, out=str(tmp_path / "elsewhere"), splits=("test",))
    prepare(elsewhere)
    for path in (tmp_path / "elsewhere").glob("test*"):  # a copy from another machine
        shutil.copy(path, tmp_path / "out")
    with pytest.raises(ValueError, match="prepare both splits anew"):
        build_source(DataConfig(source=format, root=str(tmp_path / "out")), "test")
    prepare(replace(config, splits=("train", "test"), out=str(tmp_path / "both")))


def test_out_is_not_where_the_images_are(image_folder):
    before = sorted(image_folder.rglob("*"))
    for out in (image_folder, image_folder / "x" / "..", image_folder / "train", image_folder / "val" / "digit_0"):
        with pytest.raises(ValueError, match=r"lies where SOURCE is read from .*: give a folder of its own"):
            prepare(config_for(image_folder, out))
    assert [path for path in sorted(image_folder.rglob("*")) if ".mimir_fast" not in str(path)] == before
