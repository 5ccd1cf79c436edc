"""Parquet folders as Hugging Face gives them: rows in order of the files, each read by its row group."""

import json
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from mimir_fast.data import DataConfig, build_loader, build_source
from mimir_fast.data.prepare import prepare
from mimir_fast.data.prepare_config import PrepareConfig
from mimir_fast.data.sources import MissingDataError

pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")

CLASSES = ["tench", "goldfish", "shark"]


def write(path, files, labels=True, rows=4):
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"image": [{"bytes": content, "path": f"{n}.jpg"} for n, (content, _) in enumerate(files)]}
    columns |= {"label": [label for _, label in files]} if labels else {}
    features = {"image": {"_type": "Image"}, "label": {"names": CLASSES, "_type": "ClassLabel"}}
    about = {b"huggingface": json.dumps({"info": {"features": features}}).encode()} if labels is True else None
    pyarrow.parquet.write_table(pyarrow.table(columns).replace_schema_metadata(about), path, row_group_size=rows)


@pytest.fixture
def imagenet(tmp_path, digit_jpegs, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "imagenet-1k"
    write(root / "data" / "train-00000-of-00002-abc.parquet", digit_jpegs[:10])
    write(root / "data" / "train-00001-of-00002-abc.parquet", digit_jpegs[10:])
    write(root / "data" / "validation-00000-of-00001-abc.parquet", digit_jpegs[:5])
    write(root / "data" / "test-00000-of-00001-abc.parquet", [(content, -1) for content, _ in digit_jpegs[:5]])
    return DataConfig(source="parquet", root=str(root), image_size=48, augment="resized_crop", num_workers=0)


def test_rows_and_labels(imagenet, digit_jpegs):
    train, test = build_source(imagenet, "train"), build_source(imagenet, "test")
    assert (len(train), len(test), train.block) == (24, 5, 4) and train.classes == test.classes == tuple(CLASSES)
    for index in (23, 0, 10, 9, 11):
        assert (train.read(index), train.labels[index]) == digit_jpegs[index]
    assert "train-00001" in train.where(10) and train.where(10).endswith("row 0 of row group 0")


@pytest.mark.parametrize("loader", ["torch", "dali", "resident"])
def test_the_stream_is_that_of_any_source(imagenet, loader):
    """A function of seed and epoch, dealt out over ranks, the same with processes, gone on with exactly."""
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    config = replace(imagenet, loader=loader, augment="pad_crop")

    def take(count, state=None, config=config, **options):
        data = build_loader(config, **{"split": "train", "batch_size": 6, "seed": 3, **options})
        if state:
            data.load_state_dict(state)
        batches = list(islice(data, count))
        state = data.state_dict()
        data.close()
        return batches, state

    whole, _ = take(8)
    samples = torch.cat([batch.samples for batch in whole])
    assert sorted(samples[:24].tolist()) == sorted(samples[24:].tolist()) == list(range(24))
    assert samples[:24].tolist() != samples[24:].tolist()
    ranks = [take(8, batch_size=3, rank=rank, world_size=2)[0] for rank in (0, 1)]
    rest, _ = take(5, take(3)[1], config=replace(config, num_workers=2))
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([ranks[rank][step].images for rank in (0, 1)]), batch.images)
        assert step < 3 or torch.equal(rest[step - 3].images, batch.images)


def test_few_row_groups_are_needed_at_a_time(tmp_path, digit_jpegs):
    """Of 60 groups a window has 8: neighbours in the stream come from few, so that each is read about once."""
    write(tmp_path / "train.parquet", digit_jpegs * 10)
    config = DataConfig(source="parquet", root=str(tmp_path), image_size=48, num_workers=0, loader="torch", hold_out=24)
    loader = build_loader(config, split="train", batch_size=4)  # of what is left when some are held out, too
    source, read = loader._reader.source.source, []
    group = source._group
    source._group = lambda file, number: (
        (read.append(number) if (file, number) not in source._kept else None) or group(file, number)
    )
    list(islice(loader, 54))
    assert 60 <= len(read) < 90


def test_without_names_labels_or_splits(tmp_path, digit_jpegs):
    write(tmp_path / "a.parquet", digit_jpegs, labels="numbers")
    config = DataConfig(source="parquet", root=str(tmp_path))
    assert build_source(config, "train").classes == ("0", "1", "2")
    with pytest.raises(MissingDataError, match="no parquet files of the test split"):
        build_source(config, "test")
    write(tmp_path / "b" / "a.parquet", digit_jpegs, labels=False)
    assert set(build_source(replace(config, root=str(tmp_path / "b")), "train").labels) == {-1}


def test_damaged_files_are_refused(imagenet, tmp_path):
    path = next((tmp_path / "imagenet-1k" / "data").glob("train-00000*"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="no whole parquet file"):
        build_source(imagenet, "train")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), path)
    with pytest.raises(ValueError, match="no column of images, but text"):
        build_source(imagenet, "train")


def test_they_are_prepared(imagenet, tmp_path):
    prepare(PrepareConfig(imagenet.root, str(tmp_path / "out"), source_format="parquet", num_workers=1))
    source = build_source(DataConfig(source="raw", root=str(tmp_path / "out")), "train")
    assert len(source) == 24 and source.classes == tuple(CLASSES)
    assert (
        sorted(source.labels) == sorted(build_source(imagenet, "train").labels)
        and np.isin(source.labels, (0, 1, 2)).all()
    )
