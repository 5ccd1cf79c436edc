"""Every source: shape, range, labels, and what it says when the files are not as they should be."""

import gzip
import io
import json
import pickle
import shutil
import struct
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mimir_fast.data import DataConfig, build_loader, build_source
from mimir_fast.data import config as data_config
from mimir_fast.data.decode import UnreadableImageError, checked_file, decode
from mimir_fast.data.loaders.resident import ResidentLoader
from mimir_fast.data.sources import SOURCES, MissingDataError
from mimir_fast.data.sources.base import hashes_of_names
from mimir_fast.data.sources.cifar import read_pickle
from mimir_fast.data.sources.idx import FASHION_ROOTS, read_idx


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">BBBB{array.ndim}i", 0, 0, 8, array.ndim, *array.shape)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wb") as file:
        file.write(header + array.tobytes())


def pixels_of(count: int, *shape: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(0)).integers(0, 256, (count, *shape), dtype=np.uint8)


# --- digits -----------------------------------------------------------------------------------------------------------


def test_digits_are_real_images_in_two_disjoint_splits():
    train, test = (build_source(DataConfig(image_size=32), split) for split in ("train", "test"))
    assert (len(train), len(test), train.num_classes) == (1497, 300, 10)
    assert train.images.shape == (1497, 1, 32, 32) and train.images.dtype == np.uint8
    assert train.images.min() == 0 and train.images.max() == 255
    assert set(train.labels) == set(test.labels) == set(range(10))
    known = {image.tobytes() for image in train.images}
    assert sum(image.tobytes() in known for image in test.images) == 0


def test_upsampling_keeps_the_digit():
    from sklearn.datasets import load_digits

    image = build_source(DataConfig(image_size=32), "test").images[0, 0]
    small = image.reshape(8, 4, 8, 4).mean((1, 3))
    assert np.corrcoef(small.ravel(), load_digits().images[0].ravel())[0, 1] > 0.97


# --- IDX --------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path(FASHION_ROOTS[0]).is_dir(), reason="apt-get install dataset-fashion-mnist")
def test_fashion_mnist_as_debian_lays_it():
    config = DataConfig(source="fashion_mnist", image_size=32)
    train, test = build_source(config, "train"), build_source(config, "test")
    assert (len(train), len(test), train.classes[9]) == (60_000, 10_000, "Ankle boot")
    assert train.images.shape[1:] == (1, 32, 32)
    assert train.images[:, :, :2].max() == 0 and train.images[:, :, 2:30].max() == 255  # 2 pixels of padding
    assert np.bincount(train.labels).tolist() == [6000] * 10


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_fashion_mnist_as_torchvision_lays_it(tmp_path, suffix):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    images, labels = pixels_of(20, 28, 28), np.arange(20, dtype=np.uint8) % 10
    write_idx(raw / f"train-images-idx3-ubyte{suffix}", images)
    write_idx(raw / f"train-labels-idx1-ubyte{suffix}", labels)
    source = build_source(DataConfig(source="fashion_mnist", root=str(tmp_path), image_size=32), "train")
    assert (source.images[:, 0, 2:30, 2:30] == images).all() and (source.labels == labels).all()
    with pytest.raises(MissingDataError, match=r"t10k-images.*apt-get install dataset-fashion-mnist"):
        build_source(DataConfig(source="fashion_mnist", root=str(tmp_path)), "test")


def test_any_idx_files(tmp_path):
    for prefix, count in (("train", 12), ("t10k", 4)):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte", pixels_of(count, 20, 24))
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 4)
    config = DataConfig(source="idx", root=str(tmp_path), image_size=26)
    train, test = build_source(config, "train"), build_source(config, "test")
    assert train.images.shape == (12, 1, 26, 26) and test.images.shape == (4, 1, 26, 26) and train.num_classes == 4
    assert (train.images[:, 0, 3:23, 1:25] == pixels_of(12, 20, 24)).all()
    with pytest.raises(ValueError, match="image_size 16 is smaller than the 20 x 24 images"):
        build_source(replace(config, image_size=16), "train")


def test_damaged_idx_files_are_refused(tmp_path):
    path = tmp_path / "images"
    write_idx(path, pixels_of(3, 4, 4))
    assert read_idx(path).shape == (3, 4, 4)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"cut short.*47 values for the shape \(3, 4, 4\)"):
        read_idx(path)
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match="not an IDX file"):
        read_idx(path)
    whole = gzip.compress(b"\0\0\x08\x01" + struct.pack(">i", 1000) + bytes(range(250)) * 4)
    (tmp_path / "images.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="no complete gzip file"):
        read_idx(tmp_path / "images.gz")


# --- CIFAR ------------------------------------------------------------------------------------------------------------


def write_cifar10(folder: Path, kind: str) -> tuple[np.ndarray, np.ndarray]:
    folder.mkdir(parents=True)
    images, labels = pixels_of(60, 3072), np.arange(60) % 10
    names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    for split, rows in (("train", slice(0, 50)), ("test", slice(50, 60))):
        if kind == "npm":
            (folder / f"{split}_lables.json").write_text(json.dumps(labels[rows].tolist()))
    for part, name in enumerate(names):
        rows = slice(10 * part, 10 * part + 10)
        if kind == "npm":  # a line an image, red, green and blue of a pixel together
            lines = images[rows].reshape(-1, 3, 1024).transpose(0, 2, 1)
            Image.fromarray(np.ascontiguousarray(lines)).save(folder / f"{name}.png")
        elif kind == "binary":
            records = np.concatenate([labels[rows, None].astype(np.uint8), images[rows]], axis=1)
            (folder / f"{name}.bin").write_bytes(records.tobytes())
        else:
            batch = {b"batch_label": b"part", b"labels": labels[rows].tolist(), b"data": images[rows]}
            (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    return images.reshape(-1, 3, 32, 32), labels


@pytest.mark.parametrize(
    ("folder", "kind"),
    [("cifar-10-batches-py", "pickle"), ("cifar-10-batches-bin", "binary"), ("package", "npm")],
)
def test_cifar10_in_all_formats(tmp_path, folder, kind):
    images, labels = write_cifar10(tmp_path / folder, kind)
    config = DataConfig(source="cifar10", root=str(tmp_path))
    train, test = build_source(config, "train"), build_source(config, "test")
    assert (train.images == images[:50]).all() and (train.labels == labels[:50]).all()
    assert (test.images == images[50:]).all() and test.classes[3] == "cat"
    inner = build_source(replace(config, root=str(tmp_path / folder)), "test")  # the inner folder will do, too
    assert (inner.images == test.images).all()


@pytest.mark.parametrize(
    "labels",
    ["[1, 2]", "[0, 1, 2, 3, 4, 5, 6, 7, 8, 10]", "[0, 1, 2, 3, 4, 5, 6, 7, 8, 0.5]", "{}", "7", "[1, 2", "[[1]]"],
)  # fmt: skip
def test_labels_that_are_none_of_a_npm_package(tmp_path, labels):
    write_cifar10(tmp_path / "package", "npm")
    (tmp_path / "package" / "test_lables.json").write_text(labels)
    with pytest.raises(ValueError, match=r"test_lables.json.*unpack the package again"):
        build_source(DataConfig(source="cifar10", root=str(tmp_path)), "test")


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "narrow", "cut"])
def test_pictures_that_are_none_of_a_npm_package(tmp_path, mode):
    write_cifar10(tmp_path / "package", "npm")
    path = tmp_path / "package" / "test_batch.png"
    if mode == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    else:
        Image.new(mode if mode != "narrow" else "RGB", (1024 if mode != "narrow" else 30, 10)).save(path)
    with pytest.raises(ValueError, match=r"test_batch.png.*unpack the package again"):
        build_source(DataConfig(source="cifar10", root=str(tmp_path)), "test")


def test_cifar100_takes_the_fine_labels(tmp_path):
    images, fine, coarse = pixels_of(6, 3072), [99, 5, 1, 2, 3, 4], [19, 0, 0, 1, 1, 2]
    for folder in ("cifar-100-python", "cifar-100-binary"):
        (tmp_path / folder).mkdir()
    batch = {b"fine_labels": fine, b"coarse_labels": coarse, b"data": images}
    (tmp_path / "cifar-100-python" / "train").write_bytes(pickle.dumps(batch, protocol=2))
    records = np.concatenate([np.array([coarse, fine], np.uint8).T, images], axis=1)
    (tmp_path / "cifar-100-binary" / "test.bin").write_bytes(records.tobytes())
    config = DataConfig(source="cifar100", root=str(tmp_path))
    for split in ("train", "test"):
        source = build_source(config, split)
        assert source.labels.tolist() == fine and source.num_classes == 100
        assert (source.images == images.reshape(-1, 3, 32, 32)).all()


class Hostile:
    """Unpickling this plainly would run a command."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_hostile_pickle_is_refused_and_runs_nothing(tmp_path, protocol):
    trace = tmp_path / "was-here"
    batch = {b"data": pixels_of(1, 3072), b"labels": [0], b"more": Hostile(trace)}
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(batch, protocol=protocol))
    with pytest.raises(ValueError, match="which no CIFAR batch holds"):
        read_pickle(tmp_path / "data_batch_1", "labels")
    assert not trace.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"text", pickle.dumps([1, 2]), pickle.dumps({b"data": 1, b"labels": [1]}), pickle.dumps({b"labels": [1]})],
    ids=["empty", "text", "list", "no-array", "no-data"],
)
def test_what_is_no_cifar_batch_is_refused(tmp_path, content):
    (tmp_path / "batch").write_bytes(content)
    with pytest.raises(ValueError, match="batch"):
        read_pickle(tmp_path / "batch", "labels")


def test_missing_cifar_says_how_to_get_it(tmp_path):
    with pytest.raises(MissingDataError, match=r"CIFAR10\('data', download=True\)"):
        build_source(DataConfig(source="cifar10", root=str(tmp_path)), "train")
    with pytest.raises(MissingDataError, match="needs root"):
        build_source(DataConfig(source="cifar100"), "train")


# --- folders ----------------------------------------------------------------------------------------------------------


def test_image_folder(image_folder):
    config = DataConfig(source="imagenet", root=str(image_folder), image_size=64)
    train, test = build_source(config, "train"), build_source(config, "val")
    assert train.classes == ("digit_0", "digit_1", "digit_2") == test.classes
    assert (len(train), len(test)) == (25, 8)
    photograph = next(index for index in range(len(train)) if train.where(index).endswith("china.jpg"))
    assert train.pixels(photograph).shape == (427, 640, 3) and train.labels[photograph] == 0


def test_a_class_without_test_images_shifts_no_label(image_folder):
    config = DataConfig(source="folder", root=str(image_folder))
    shutil.rmtree(image_folder / "val" / "digit_1")
    source = build_source(config, "test")
    assert source.num_classes == 3 and set(source.labels) == {0, 2}
    assert all(f"digit_{label}" in source.where(index) for index, label in enumerate(source.labels))
    (image_folder / "val" / "digit_0").rename(image_folder / "val" / "zero")
    with pytest.raises(ValueError, match="lacks: zero"):
        build_source(config, "test")


def test_folders_without_images_are_refused(tmp_path, image_folder):
    def build(root: Path):
        return build_source(DataConfig(source="folder", root=str(root)), "train")

    with pytest.raises(MissingDataError, match="no folder train"):
        build(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match="no class folders"):
        build(tmp_path)
    (tmp_path / "train" / "cat").mkdir()
    with pytest.raises(ValueError, match=r"one class only \(cat\)"):
        build(tmp_path)
    (tmp_path / "train" / "dog").mkdir()
    with pytest.raises(ValueError, match="cat holds no images"):
        build(tmp_path)
    with pytest.raises(MissingDataError, match="nowhere does not exist"):
        build(tmp_path / "nowhere")


def test_tiny_imagenet(tmp_path, digit_jpegs):
    root, wnids = tmp_path / "tiny-imagenet-200", ["n02", "n01"]
    for number, wnid in enumerate(wnids):
        (root / "train" / wnid / "images").mkdir(parents=True)
        for shot in range(3):
            path = root / "train" / wnid / "images" / f"{wnid}_{shot}.JPEG"
            path.write_bytes(digit_jpegs[3 * number + shot][0])
    (root / "val" / "images").mkdir(parents=True)
    (root / "val" / "images" / "val_0.JPEG").write_bytes(digit_jpegs[0][0])
    listing = root / "val" / "val_annotations.txt"
    listing.write_text("val_0.JPEG\tn02\t0\t0\t62\t62\n")
    config = DataConfig(source="tiny_imagenet", root=str(tmp_path), image_size=64)
    train, test = build_source(config, "train"), build_source(config, "test")
    assert train.classes == ("n01", "n02") and train.labels.tolist() == [0, 0, 0, 1, 1, 1] and train.image_size == 64
    assert test.labels.tolist() == [1] and test.read(0) == digit_jpegs[0][0]
    loader = build_loader(config, split="train", batch_size=6)
    assert isinstance(loader, ResidentLoader) and next(iter(loader)).images.shape == (6, 3, 64, 64)
    np.savez(tmp_path / "1m.npz", image=np.full((9, 64, 64, 3), 7, np.uint8), label=np.zeros(9, int))
    (root / "train" / "n01" / "images" / "a.jpg").write_text("not an image")
    for name in ("resident", "torch"):
        mixed = replace(config, generated=str(tmp_path / "1m.npz"), loader=name, augment="none", num_workers=0)
        loader = build_loader(mixed, split="train", batch_size=30)
        batch = next(iter(loader))
        is_generated = batch.samples >= loader.num_samples
        assert is_generated.sum() == 21 and (batch.images[is_generated] == 7).all()
        assert [path.rsplit("/", 1)[1] for path in loader.skipped] == ["a.jpg"]
        assert set(batch.samples[~is_generated].tolist()) == {1, 2, 3, 4, 5, 6}  # 0 is the text file
    listing.write_text("val_0.JPEG\tn77\t0\t0\t62\t62\n")
    with pytest.raises(ValueError, match="n77"):
        build_source(config, "test")
    listing.unlink()
    with pytest.raises(MissingDataError, match=r"val_annotations\.txt is missing"):
        build_source(config, "test")


# --- webdataset -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["folder", "pattern"])
def test_shards_are_read_at_random(shards, digit_jpegs, how):
    root = shards if how == "folder" else shards / "train-{00..01}.tar"
    source = build_source(DataConfig(source="webdataset", root=str(root)), "train")
    assert len(source) == 24 and source.num_classes == 3
    for index in (23, 0, 10, 9):
        assert source.read(index) == digit_jpegs[index][0] and source.labels[index] == digit_jpegs[index][1]


def test_the_shard_index_is_kept_and_follows_the_file(shards, monkeypatch):
    from mimir_fast.data.sources import shards as module

    config = DataConfig(source="webdataset", root=str(shards))
    time.sleep(0.15)  # an index of what changed just now is not kept
    first = build_source(config, "test")
    with monkeypatch.context() as patch:
        patch.setattr(module, "scan_shard", lambda shard: pytest.fail(f"{shard} was scanned again"))
        assert (build_source(config, "test").offsets == first.offsets).all()
    shutil.copy(shards / "train-01.tar", shards / "val-00.tar")
    assert len(build_source(config, "test")) == 14


def test_bad_shards_are_refused(shards):
    with pytest.raises(MissingDataError, match=r"missing are 1 of 3 shards.*train-02"):
        build_source(DataConfig(source="webdataset", root=str(shards / "train-{00..02}.tar")), "train")
    with pytest.raises(MissingDataError, match="no tar files of the test split"):
        build_source(DataConfig(source="webdataset", root=str(shards / "train-{00..01}.tar")), "test")
    path = shards / "val-00.tar"
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(ValueError, match=r"val-00\.tar is"):
        build_source(DataConfig(source="webdataset", root=str(shards)), "test")


# --- files and configuration ------------------------------------------------------------------------------------------


def encoded(mode: str, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels_of(20, 30, 3)).convert(mode).save(file, format=kind)
    return file.getvalue()


@pytest.mark.parametrize(
    ("mode", "kind"), [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "PNG")]
)
def test_odd_files_reach_every_decoder_as_the_same_pixels(mode, kind):
    content = encoded(mode, kind)
    passed, height, width = checked_file(content, "here")
    assert (height, width) == (20, 30)
    assert (decode(passed, "here") == decode(content, "here")).all()
    assert (passed is content) == (mode in ("RGB", "L"))  # the common ones are not decoded on the way


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("keep", [0.0, 0.02, 0.5, 0.97])
def test_a_file_cut_short_is_noticed(kind, keep):
    content = encoded("RGB", kind)
    for judge in (decode, checked_file):
        with pytest.raises(UnreadableImageError, match="here: "):
            judge(content[: int(len(content) * keep)], "here")


def test_limit_takes_evenly_so_that_all_classes_stay(image_folder):
    config = DataConfig(source="folder", root=str(image_folder), limit=6)
    source = build_source(config, "train")
    assert len(source) == 6 and set(source.labels) == {0, 1, 2}
    whole = build_source(replace(config, limit=None), "train")
    assert source.read(5) == whole.read(5 * 25 // 6) and source.where(5) == whole.where(5 * 25 // 6)
    assert len(build_source(DataConfig(limit=10), "train")) == 10


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(ValueError, match="did you mean cifar10"):  # before anything is read, or a folder made
        DataConfig(source="cifar-10")
    with pytest.raises(ValueError, match="'train', 'held_out' or 'test'"):
        build_source(DataConfig(), "training")


def test_the_help_names_every_source():
    said = (Path(data_config.__file__).read_text()).partition('source: str = "digits"')[2].partition("root:")[0]
    ours = [name for name, build in SOURCES.all().items() if build.__module__.startswith("mimir_fast.data.")]
    assert len(ours) > 5 and not [name for name in ours if name not in said]


@pytest.mark.parametrize(
    "bad",
    [
        {"image_size": 0}, {"channels": 2}, {"loader": "fast"}, {"augment": "crop"}, {"num_workers": -1},
        {"crop_padding": -1}, {"crop_scale": (0.5, 0.2)}, {"crop_scale": (0.2, 8.0)}, {"crop_ratio": (0.0, 1.0)},
        {"generated_ratio": 1.0}, {"max_bad_files": -1}, {"limit": 0}, {"resident_gib": -1.0}, {"hw_decoder_load": 2.0},
    ],
    ids=str,
)  # fmt: skip
def test_bad_configurations_are_refused_by_field(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        DataConfig(**bad)


def test_names_are_hashed_alike_whatever_stands_beside_them():
    names = np.array([b"a/1.jpg", b"a/2.jpg", b"a/2.jpg.png", b"b/12345678901234567890.jpg"])
    found = hashes_of_names(names)
    assert len(set(found.tolist())) == 4 and (found >= 0).all() and (found < 2**32).all()
    assert (hashes_of_names(names[:2].astype("S7")) == found[:2]).all()
    many = np.array([f"n{number % 7}/{number}.jpg".encode() for number in range(70_000)])
    assert len(np.unique(hashes_of_names(many))) > 69_990
