"""Other people's folders and archives: nested, unlabelled, with other files among them, labelled by a list."""

import io
import os
import struct
import tarfile
import time
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run_module
from PIL import Image

from mimir_fast.data import DataConfig, build_loader, build_source
from mimir_fast.data.decode import checked_file, decode
from mimir_fast.data.sources import MissingDataError
from mimir_fast.training.finetuning import FinetuneConfig, probe_data
from mimir_fast.world import World

IMAGES = ("b/cat.JPG", "b/deep/er/dog.png", "c/three.tiff", "c/two.webp", "c/x.gif", "one.jpeg")
OTHERS = ("Thumbs.db", "b/notes.txt", "c/film.mp4", ".git/x.png", "b/._cat.JPG", "b/.ipynb_checkpoints/y.jpg")


def picture(kind: str, value: int = 100) -> bytes:
    file = io.BytesIO()
    pixels = np.arange(40 * 48 * 3, dtype=np.uint32).reshape(40, 48, 3) * value % 256
    Image.fromarray(pixels.astype(np.uint8)).save(file, kind)
    return file.getvalue()


def contents() -> dict[str, bytes]:
    kinds = {"jpg": "JPEG", "jpeg": "JPEG", "tiff": "TIFF"}
    images = {name: picture(kinds.get(kind := name.rpartition(".")[2].lower(), kind.upper())) for name in IMAGES}
    return images | dict.fromkeys(OTHERS, b"none")


def put(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def pack(path: Path, files: dict[str, bytes]) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(
            path, "w", zipfile.ZIP_STORED if "stored" in path.name else zipfile.ZIP_DEFLATED
        ) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return path
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def images(root: Path, **options) -> DataConfig:
    return DataConfig(source="images", root=str(root), image_size=32, num_workers=0, **options)


@pytest.fixture(params=["folder", "deflated.zip", "stored.zip", "images.tar"])
def anything(request, tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / request.param
    return put(path, contents()) if request.param == "folder" else pack(path, contents())


def test_all_images_and_nothing_else(anything, caplog):
    source = build_source(images(anything), "train")
    assert [source.where(i).removeprefix(f"{anything}")[1:].strip() for i in range(len(source))] == sorted(
        IMAGES, key=os.path.split if anything.is_dir() else None
    )
    assert source.labels.tolist() == [-1] * 6 and source.classes == ()
    assert all(source.read(i) == contents()[source.where(i).removeprefix(f"{anything}")[1:].strip()] for i in range(6))
    # The hidden folders of a folder count as one each.
    assert "6 files left out, hidden or no images by their names: " in caplog.text
    time.sleep(0.15)  # an index of what changed just now is not kept
    again = [build_source(images(anything), "train") for _ in range(2)]
    assert all((source.identities() == other.identities()).all() for other in again)
    with pytest.raises(MissingDataError, match="all images are to train on"):
        build_source(images(anything), "test")


def test_every_kind_of_file_becomes_pixels(anything):
    batch = next(iter(build_loader(images(anything), split="train", batch_size=6)))
    assert batch.images.shape == (6, 3, 32, 32) and (batch.images.float().flatten(1).std(1) > 10).all()


@pytest.mark.parametrize("form", ["folder", "images.zip"])
def test_folders_called_train_and_val_are_the_splits(tmp_path, form):
    files = {"train/a/1.png": picture("PNG"), "val/2.png": picture("PNG", 3), "readme.txt": b"x", "3.png": b"beside"}
    root = put(tmp_path / form, files) if form == "folder" else pack(tmp_path / form, files)
    for split, name in (("train", "train/a/1.png"), ("test", "val/2.png")):
        source = build_source(images(root), split)
        assert len(source) == 1 and source.read(0) == files[name]


def test_a_new_file_deep_down_is_seen(tmp_path):
    root = put(tmp_path / "folder", {"a/b/c/1.png": picture("PNG")})
    time.sleep(0.15)
    assert len(build_source(images(root), "train")) == len(build_source(images(root), "train")) == 1
    put(root, {"a/b/c/2.png": picture("PNG")})
    assert len(build_source(images(root), "train")) == 2
    put(root, {"a/d/3.png": picture("PNG")})
    assert len(build_source(images(root), "train")) == 3


def test_links_are_followed_but_not_round_and_round(tmp_path):
    root = put(tmp_path / "folder", {"a/1.png": picture("PNG")})
    put(tmp_path / "elsewhere", {"2.png": picture("PNG")})
    (root / "b").symlink_to(tmp_path / "elsewhere")
    (root / "a" / "up").symlink_to(root)
    (root / "gone.png").symlink_to(tmp_path / "nowhere")
    source = build_source(images(root), "train")
    assert [source.where(i) for i in range(len(source))] == [f"{root}/a/1.png", f"{root}/b/2.png"]


def test_archives_that_cannot_be_read_are_refused(tmp_path):
    good = pack(tmp_path / "a.zip", contents()).read_bytes()
    for name, content, message in (
        ("cut.zip", good[:-200], "is no zip file, or is cut short"),
        ("cut", good[:-200], "is no zip file, or is cut short"),
        ("images.tar.gz", zlib.compress(good), "is not a whole, uncompressed tar file"),
        ("cut.tar", pack(tmp_path / "b.tar", contents()).read_bytes()[:-10_240], "cut short"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            build_source(images(tmp_path / name), "train")
    with zipfile.ZipFile(tmp_path / "lzma.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a.png", b"x")
    with pytest.raises(ValueError, match="compressed by method 14"):
        build_source(images(tmp_path / "lzma.zip"), "train")
    with pytest.raises(ValueError, match="holds no images"):
        build_source(images(pack(tmp_path / "none.zip", {"a.txt": b"x"})), "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no images .*; is it the folder you meant\?"):
        build_source(images(tmp_path / "empty"), "train")


def test_a_zip_bomb_is_not_inflated(tmp_path):
    source = build_source(images(pack(tmp_path / "bomb.zip", {"a.png": bytes(50_000_000)})), "train")
    source.sizes = np.array([1000])  # as a header may claim
    assert len(source.read(0)) == 1000


def test_fine_tuning_on_unlabelled_images_says_what_it_needs(tmp_path):
    put(tmp_path, {f"{split}/{n}.png": picture("PNG") for split in ("train", "val") for n in range(3)})
    with pytest.raises(ValueError, match="fine-tuning needs a labelled data set"):
        probe_data(FinetuneConfig(data=images(tmp_path)), World(0, 1, torch.device("cpu")))


@pytest.mark.slow
def test_unlabelled_images_pretrain(tmp_path):
    root = pack(tmp_path / "photos.zip", {f"p/{n}.png": picture("PNG", n + 1) for n in range(12)})
    options = ["--data.source", "images", "--data.root", str(root), "--batch_size", "4", "--max_steps", "2"]
    command = [
        "mimir_fast.pretrain",
        "--recipe",
        "digits/mimir_vit_nano",
        *options,
        "--output_dir",
        str(tmp_path / "run"),
    ]
    result = run_module(tmp_path, *command, "--data.num_workers", "0")
    assert result.returncode == 0, result.stderr


# --- labels -----------------------------------------------------------------------------------------------------------


def folder(root: Path) -> DataConfig:
    return DataConfig(source="folder", root=str(root), image_size=32)


def test_nested_and_hidden_folders_of_classes(tmp_path, caplog):
    """As torchvision numbers them, except that hidden folders are no classes there is anything to see in."""
    names = ("cat/1.png", "cat/sub/2.png", "dog/3.png", "dog/a/b/4.png", "dog/Thumbs.db", ".old/5.png", "6.png")
    put(tmp_path / "train", dict.fromkeys(names, picture("PNG")))
    source = build_source(folder(tmp_path), "train")
    assert source.classes == ("cat", "dog") and source.labels.tolist() == [0, 0, 1, 1]
    ours = [(source.where(i), int(source.labels[i])) for i in range(4)]
    assert ours == [(str(tmp_path / "train" / name), label) for name, label in zip(names, (0, 0, 1, 1), strict=False)]
    assert "dog/Thumbs.db" in caplog.text and ".old" in caplog.text and "6.png" in caplog.text


@pytest.mark.slow
def test_samples_are_those_of_torchvision(tmp_path):
    from torchvision.datasets import ImageFolder

    names = (
        "a b/z.png",
        "a b/sub/1.JPG",
        "a/2.tif",
        "a/.x/3.png",
        "a/b.c/4.webp",
        "a/b/5.bmp",
        "a/b-1/6.ppm",
        "a/no.txt",
    )
    put(tmp_path / "train", dict.fromkeys(names, picture("PNG")))
    source, theirs = build_source(folder(tmp_path), "train"), ImageFolder(tmp_path / "train")
    ours = [(source.where(i), int(source.labels[i])) for i in range(len(source))]
    assert ours == [(path, label) for path, label in theirs.samples if "/.x/" not in path]
    assert list(source.classes) == theirs.classes


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_a_flat_folder_with_metadata(tmp_path, form):
    """As Hugging Face's ImageFolder lays it."""
    rows = {"1.png": "dog", "sub/2.png": "cat", "3.png": "dog"}
    put(tmp_path / "train", dict.fromkeys((*rows, "4.png"), picture("PNG")))
    lines = ["file_name,other,label", *(f"{file},x,{label}" for file, label in rows.items())]
    if form == "jsonl":
        lines = [f'{{"file_name": "{file}", "label": "{label}"}}' for file, label in rows.items()]
    (tmp_path / "train" / f"metadata.{form}").write_text("\n".join(lines))
    source = build_source(folder(tmp_path), "train")
    assert source.classes == ("cat", "dog") and source.labels.tolist() == [1, 0, 1]
    assert [source.where(i) for i in range(3)] == [str(tmp_path / "train" / file) for file in rows]
    put(tmp_path / "val", {"9.png": picture("PNG"), "metadata.csv": b"file_name,label\n9.png,dog\n"})
    assert build_source(folder(tmp_path), "test").labels.tolist() == [1]  # numbered by the training images
    for content, message in (
        ("file_name,label\n9.png,cow\n", "none of the 2 classes: cow"),
        ("file_name,text\n9.png,a dog\n", "columns file_name, text; wanted file_name and one of label"),
        ("file_name,label\n8.png,dog\n", "names 1 images that .* lacks, first 8.png"),
        ("file_name,label\n../train/1.png,dog\n", "which is not in .*; refused"),
        ("file_name,label\n", "names no images"),
    ):
        (tmp_path / "val" / "metadata.csv").write_text(content)
        with pytest.raises(ValueError, match=message):
            build_source(folder(tmp_path), "test")


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("synset_labels.txt", ["n02", "n01", "n02"]),
        ("imagenet_2012_validation_synset_labels.txt", ["n02", "n01", "n02"]),
        ("val.txt", ["I_3.JPEG 1", "I_1.JPEG 1", "I_2.JPEG 0"]),
        (
            "LOC_val_solution.csv",
            ["ImageId,PredictionString", "I_3,n02 1 2 3 4", "I_1,n02 5 6 7 8 n02 1 2 3 4", "I_2,n01 1"],
        ),
    ],
    ids=["synsets", "tensorflow", "caffe", "kaggle"],
)
@pytest.mark.parametrize("place", ["val", "."])
def test_the_flat_validation_folder_of_imagenet(tmp_path, name, lines, place):
    put(tmp_path, dict.fromkeys([f"train/n0{c}/1.JPEG" for c in (1, 2)], picture("JPEG")))
    put(tmp_path, dict.fromkeys([f"val/I_{n}.JPEG" for n in (1, 2, 3)], picture("JPEG")))
    (tmp_path / place / name).write_text("\n".join(lines))
    source = build_source(DataConfig(source="imagenet", root=str(tmp_path)), "test")
    assert {source.where(i)[-6]: int(source.labels[i]) for i in range(3)} == {"1": 1, "2": 0, "3": 1}
    assert source.classes == ("n01", "n02")
    (tmp_path / "val" / "I_4.JPEG").write_bytes(b"one more")
    if len(lines[0].split()) == 1 and name.endswith(".txt"):
        with pytest.raises(ValueError, match=r"3 labels, but .* holds 4 images"):
            build_source(DataConfig(source="imagenet", root=str(tmp_path)), "test")


def test_the_devkits_numbers_are_not_taken_for_classes(tmp_path):
    put(tmp_path, dict.fromkeys(["train/n01/1.JPEG", "train/n02/1.JPEG", "val/I_1.JPEG"], picture("JPEG")))
    (tmp_path / "ILSVRC2012_validation_ground_truth.txt").write_text("490\n")
    with pytest.raises(ValueError, match="ILSVRC2012_ID, which is no order of their synsets"):
        build_source(DataConfig(source="imagenet", root=str(tmp_path)), "test")


# --- depth ------------------------------------------------------------------------------------------------------------


RAMP = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)


def png_of_16_bits(levels: np.ndarray) -> bytes:
    """(H, W, 1 or 3) uint16; PIL cannot write them in colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    header = struct.pack(">IIBBBBB", levels.shape[1], levels.shape[0], 16, 0 if levels.shape[2] == 1 else 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def grey_tiff(levels: np.ndarray, bits: int, photometric: int = 1, order: str = "<") -> bytes:
    """(32, 32) uint16 as a TIFF of 12 or 16 bits; photometric 0: zero is white."""
    data = levels.astype(f"{order}u2").tobytes()
    if bits == 12:
        pairs = levels.astype(int).reshape(-1, 2).tolist()
        data = b"".join((first << 12 | second).to_bytes(3, "big") for first, second in pairs)
    tags = {
        256: 32,
        257: 32,
        258: bits,
        259: 1,
        262: photometric,
        273: 8 + 2 + 9 * 12 + 4,
        277: 1,
        278: 32,
        279: len(data),
    }
    entries = b"".join(
        struct.pack(f"{order}HHI", tag, 4, 1) + struct.pack(f"{order}I", value)
        if tag in (273, 279) else struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0)
        for tag, value in tags.items()
    )  # fmt: skip
    start = b"II" if order == "<" else b"MM"
    return start + struct.pack(f"{order}HIH", 42, 8, len(tags)) + entries + bytes(4) + data


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (png_of_16_bits(RAMP[:, :, None]), RAMP >> 8),
        (grey_tiff(RAMP, 16), RAMP >> 8),
        (grey_tiff(RAMP, 16, order=">"), RAMP >> 8),
        (grey_tiff(RAMP, 16, photometric=0), 255 - (RAMP >> 8)),
        (grey_tiff(RAMP >> 4, 12), RAMP >> 8),
    ],
    ids=["png", "tiff", "big-endian", "white zero", "12 bits"],
)
def test_grey_levels_of_many_bits_are_scaled(content, wanted):
    for pixels in (decode(content, "here"), decode(checked_file(content, "here")[0], "here")):
        assert np.array_equal(pixels[..., 0], wanted)


def test_colours_of_sixteen_bits_are_equal_in_all_loaders_and_prepared(tmp_path):
    """DALI would round v / 257, PIL takes v >> 8: they differ in half of all levels."""
    from mimir_fast.data.prepare import prepare
    from mimir_fast.data.prepare_config import PrepareConfig

    colours = np.stack([RAMP, RAMP[::-1], RAMP.T], axis=2)
    put(tmp_path, {f"train/{name}/a.png": png_of_16_bits(colours) for name in ("one", "two")})
    prepare(PrepareConfig(str(tmp_path), str(tmp_path / "raw"), num_workers=1))
    prepare(PrepareConfig(str(tmp_path), str(tmp_path / "tar"), format="webdataset", num_workers=1))
    config = replace(folder(tmp_path), augment="none", num_workers=0, flip=False)
    asked = [replace(config, loader=loader) for loader in ("torch", "resident")]
    asked += [replace(config, source="raw", root=str(tmp_path / "raw"))]
    asked += [replace(config, source="webdataset", root=str(tmp_path / "tar"))]
    try:
        import nvidia.dali  # noqa: F401

        asked += [replace(config, loader="dali")]
    except ImportError:
        pass
    for each in asked:
        batch = next(iter(build_loader(each, split="train", batch_size=2)))
        assert torch.equal(batch.images[0].permute(1, 2, 0), torch.from_numpy((colours >> 8).astype(np.uint8)))
