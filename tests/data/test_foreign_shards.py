"""Other people's tar shards: samples as webdataset, DALI and Hugging Face's datasets read them, and their splits."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mimir_fast.data import DataConfig, build_source
from mimir_fast.data.prepare import prepare
from mimir_fast.data.prepare_config import PrepareConfig
from mimir_fast.data.sources import MissingDataError
from mimir_fast.data.sources.shard_names import split_of


def picture(kind: str, value: int = 1) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), value, np.uint8)).save(file, kind)
    return file.getvalue()


JPG, PNG, TIFF = picture("JPEG"), picture("PNG", 2), picture("TIFF", 3)


def tar(path: Path, *members: tuple[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def shards(root: Path | str) -> DataConfig:
    return DataConfig(source="webdataset", root=str(root))


SAMPLES = (
    (("json beside cls", 1, JPG), [("0.jpg", JPG), ("0.cls", b"1"), ("0.json", b'{"width": 16}')]),
    (("json first", 2, JPG), [("1.json", b'{"label": null}'), ("1.cls", b"2"), ("1.jpg", JPG)]),
    (("capitals", 3, JPG), [("2.JPG", JPG), ("2.CLS", b"3\n")]),
    (("a mask as png", 4, JPG), [("3.png", PNG), ("3.jpg", JPG), ("3.cls", b"4")]),
    (("two dots", 5, JPG), [("4.seg.png", PNG), ("4.jpg", JPG), ("4.cls", b"5")]),
    (("tiff", 6, TIFF), [("5.tiff", TIFF), ("5.json", b'{"label": 6}')]),
    (("no label", -1, PNG), [("6.png", PNG), ("6.json", b'{"url": "x"}')]),
    (("folders", 7, JPG), [("a/0.jpg", JPG), ("a/0.cls", b"7"), ("b/0.cls", b"8"), ("._x", b"")]),
)  # fmt: skip


def test_samples_of_every_make(tmp_path):
    source = build_source(
        shards(tar(tmp_path / "train-0.tar", *(m for _, members in SAMPLES for m in members)).parent), "train"
    )
    assert len(source) == len(SAMPLES)  # b/0 has no image
    for index, ((name, label, content), _) in enumerate(SAMPLES):
        assert (source.labels[index], source.read(index)) == (label, content), name


@pytest.mark.slow
def test_they_are_read_as_webdataset_and_datasets_read_them(tmp_path):
    """`pip install datasets` for the second."""
    import webdataset

    path = tar(tmp_path / "train-0.tar", *(member for _, members in SAMPLES[:5] for member in members))
    theirs = [
        (int(sample["cls"]), webdataset.filters.getfirst(sample, "jpg;jpeg;png"))
        for sample in webdataset.WebDataset(str(path), shardshuffle=False)
    ]
    source = build_source(shards(tmp_path), "train")
    assert theirs == [(source.labels[index], source.read(index)) for index in range(5)]
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"jpg": datasets.Image(decode=False), "cls": datasets.Value("int64")})
    tar(tmp_path / "hf" / "train-0.tar", *SAMPLES[0][1][:2], *SAMPLES[3][1][1:])
    data = datasets.load_dataset(
        "webdataset",
        data_files={"train": str(tmp_path / "hf" / "*.tar")},
        split="train",
        cache_dir=str(tmp_path / "hub"),
    ).cast(datasets.Features({**features, "__key__": datasets.Value("string"), "__url__": datasets.Value("string")}))
    source = build_source(shards(tmp_path / "hf"), "train")
    assert [(row["cls"], row["jpg"]["bytes"]) for row in data] == [(source.labels[i], source.read(i)) for i in range(2)]


@pytest.mark.slow
def test_dali_reads_the_same_where_one_image_is_there(tmp_path):
    """Of jpg and png in a sample DALI's reader takes what comes first in the tar, and it knows no capitals."""
    dali = pytest.importorskip("nvidia.dali")
    chosen = [members for _, members in (*SAMPLES[:2], SAMPLES[4])]
    path = tar(tmp_path / "train-0.tar", *(member for members in chosen for member in members))

    @dali.pipeline_def
    def pipeline():
        return tuple(dali.fn.readers.webdataset(paths=[str(path)], ext=["jpg;png", "cls"]))

    read = pipeline(batch_size=3, num_threads=1, device_id=None).run()
    source = build_source(shards(tmp_path), "train")
    for index in range(3):
        assert bytes(np.asarray(read[0][index])) == source.read(index)
        assert int(bytes(np.asarray(read[1][index]))) == source.labels[index]


@pytest.mark.parametrize("member", ["cls", "json"])
def test_classes_by_name(tmp_path, member):
    def label(name):
        return name.encode() if member == "cls" else json.dumps({"label": name}).encode()

    names = ("red fox", "cat", "dog")
    tar(
        tmp_path / "train-0.tar",
        *(m for n, x in enumerate(names) for m in ((f"{n}.jpg", JPG), (f"{n}.{member}", label(x)))),
    )
    tar(tmp_path / "val-0.tar", ("0.jpg", JPG), (f"0.{member}", label("dog")))
    train, test = (build_source(shards(tmp_path), split) for split in ("train", "test"))
    assert train.classes == test.classes == ("cat", "dog", "red fox")
    assert train.labels.tolist() == [2, 0, 1] and test.labels.tolist() == [1]
    tar(tmp_path / "val-0.tar", ("0.jpg", JPG), (f"0.{member}", label("cow")))
    with pytest.raises(ValueError, match="none of the 3 classes: cow"):
        build_source(shards(tmp_path), "test")
    tar(tmp_path / "train-1.tar", ("7.jpg", JPG), ("7.cls", b"1"))
    with pytest.raises(ValueError, match=r"by name \(cat\) and others by number \(1\)"):
        build_source(shards(tmp_path), "train")


def test_the_training_shards_count_the_classes(tmp_path):
    for name, labels in (("train-0.tar", (0, 1, 2)), ("val-0.tar", (0, 1))):
        tar(tmp_path / name, *(m for n in labels for m in ((f"{n}.jpg", JPG), (f"{n}.cls", str(n).encode()))))
    assert build_source(shards(tmp_path), "test").num_classes == 3
    tar(tmp_path / "val-0.tar", ("0.jpg", JPG), ("0.cls", b"3"))
    with pytest.raises(ValueError, match=r"label 3, but .* 3 classes"):
        build_source(shards(tmp_path), "test")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-000.tar", "train"), ("imagenet-train_000.tar", "train"), ("latest-train.tar", "train"),
        ("TRAIN1.tar", "train"),
        ("trainval-000.tar", None), ("contest-0.tar", None), ("interval.tar", None), ("val0.tar", "val"),
        ("x.validation.3.tar", "val"), ("test-0.tar", "test"), ("latest-0.tar", None), ("train/0.tar", "train"),
        ("val/latest-0.tar", "val"), ("train/val-0.tar", "val"),
    ],
)  # fmt: skip
def test_whole_words_say_the_split(name, split):
    assert split_of(Path("/data") / name) == split


def test_a_shard_is_never_in_two_splits(tmp_path):
    for name, value in (
        ("latest-train-0", b"0"),
        ("train-1", b"0"),
        ("trainval-0", b"0"),
        ("val-0", b"0"),
        ("test-0", b"0"),
    ):
        tar(tmp_path / f"{name}.tar", ("0.jpg", JPG), ("0.cls", value))
    files = {split: [path.name for path in build_source(shards(tmp_path), split).shards] for split in ("train", "test")}
    assert files == {"train": ["latest-train-0.tar", "train-1.tar"], "test": ["val-0.tar"]}
    tar(tmp_path / "train_test_split.tar", ("0.jpg", JPG))
    with pytest.raises(ValueError, match="is it of train or test\\? Its name says both"):
        build_source(shards(tmp_path), "train")


def test_a_pattern_serves_one_split_only(tmp_path):
    for number in range(4):
        tar(tmp_path / f"shard-{number}.tar", ("0.jpg", JPG), ("0.cls", b"0"))
    pattern = f"{tmp_path}/shard-{{0..3}}.tar"
    assert len(build_source(shards(pattern), "train")) == 4
    with pytest.raises(MissingDataError, match="no tar files of the test split"):  # it would be the training images
        build_source(shards(pattern), "test")
    (tmp_path / "shard-3.tar").rename(tmp_path / "shard-val-3.tar")
    both = f"{tmp_path}/shard-{{0,1,2,val-3}}.tar"
    assert len(build_source(shards(both), "test")) == 1
    with pytest.raises(MissingDataError, match="no tar files of the train split"):
        build_source(shards(both), "train")
    for number in range(3):
        (tmp_path / f"shard-{number}.tar").rename(tmp_path / f"shard-train-{number}.tar")
    both = f"{tmp_path}/shard-{{train-0,train-1,train-2,val-3}}.tar"
    assert [len(build_source(shards(both), split)) for split in ("train", "test")] == [3, 1]


@pytest.mark.parametrize("keep", ["members", "half of the mark", "all"])
def test_a_tar_cut_between_members_is_noticed(tmp_path, keep):
    path = tar(tmp_path / "train-0.tar", ("0.jpg", JPG), ("0.cls", b"0"), ("1.jpg", JPG), ("1.cls", b"0"))
    with tarfile.open(path) as archive:
        ends = [member.offset_data + -(-member.size // 512) * 512 for member in archive]
    with path.open("r+b") as file:
        file.truncate({"members": ends[1], "half of the mark": ends[3] + 100, "all": ends[3] + 512}[keep])
    if keep == "all":  # one block of zeros is enough: some writers put no second
        assert len(build_source(shards(tmp_path), "train")) == 2
        return
    with pytest.raises(ValueError, match=r"train-0\.tar is cut short"):
        build_source(shards(tmp_path), "train")


def test_a_second_archive_behind_the_end_is_not_lost_in_silence(tmp_path):
    path = tar(tmp_path / "train-0.tar", ("0.jpg", JPG), ("0.cls", b"0"))
    path.write_bytes(path.read_bytes() * 2)  # cat a.tar b.tar
    with pytest.raises(ValueError, match="holds more behind its end"):
        build_source(shards(tmp_path), "train")


def test_our_own_shards_have_a_key_for_each_sample_and_the_names_of_classes(tmp_path):
    for n in range(6):
        path = tmp_path / "photos" / "train" / ("cat", "dog", "fox")[n % 3] / f"{n}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(JPG)
    prepare(PrepareConfig(
        str(tmp_path / "photos"), str(tmp_path / "out"), format="webdataset", images_per_shard=2, num_workers=1
    ))  # fmt: skip
    keys = []
    for path in (tmp_path / "out").glob("*.tar"):
        with tarfile.open(path) as archive:
            keys += archive.getnames()
    assert len(keys) == len(set(keys)) == 12
    source = build_source(shards(tmp_path / "out"), "train")
    assert source.classes == ("cat", "dog", "fox") and sorted(source.labels) == [0, 0, 1, 1, 2, 2]
