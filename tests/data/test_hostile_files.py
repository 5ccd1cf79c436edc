"""Files made to do harm: bombs are refused before memory is asked for, names that lead elsewhere are refused."""

import gzip
import io
import struct
import tarfile
import time
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from mimir_fast.data import DataConfig, build_source
from mimir_fast.data.decode import MAX_FILE_BYTES, UnreadableImageError, checked_file, decode
from mimir_fast.data.npz import map_member
from mimir_fast.data.sources.idx import read_idx


@pytest.fixture(autouse=True)
def little_memory():
    """None of these may ask for more than a few MB."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6


def png(width: int, height: int) -> bytes:
    """The header of a PNG file of any size, with too little behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(12_000, 12_000), (20_000, 20_000), (60_000, 60_000), (2**31 - 1, 1)], ids=str)
@pytest.mark.parametrize("judge", [decode, checked_file])
def test_image_bombs(size, judge):
    with pytest.raises(UnreadableImageError, match="here: "):
        judge(png(*size), "here")


def test_the_largest_real_images_pass_the_check_of_size():
    file = io.BytesIO()
    Image.new("L", (9331, 65)).save(file, format="PNG")
    assert decode(file.getvalue(), "here").shape == (65, 9331, 1)


def test_a_huge_file_among_the_images_is_not_read(image_folder):
    path = image_folder / "train" / "digit_0" / "huge.jpg"
    with path.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)  # sparse: it takes no room
    source = build_source(DataConfig(source="folder", root=str(image_folder)), "train")
    index = next(i for i in range(len(source)) if source.path(i) == path)
    with pytest.raises(UnreadableImageError, match="more than an image has"):
        source.read(index)


def npz_with(path, shape: str, descr: str = "|u1", compression: int = zipfile.ZIP_STORED, data: bytes = bytes(64)):
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"
    head = header.encode().ljust(117) + b"\n"
    member = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + data
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("image.npy", member)
    return path


@pytest.mark.parametrize("shape", ["(1000000000000,)", "(1048576, 1048576, 1048576, 1048576)", "(-5,)", "(65,)"])
def test_npz_that_claims_more_than_it_holds(tmp_path, shape):
    with pytest.raises(ValueError, match="claims"):
        map_member(npz_with(tmp_path / "a.npz", shape), "image")


def test_npz_bombs_and_objects(tmp_path):
    bomb = npz_with(tmp_path / "b.npz", "(8000000,)", compression=zipfile.ZIP_DEFLATED, data=bytes(8_000_000))
    assert bomb.stat().st_size < 100_000
    with pytest.raises(ValueError, match="compressed"):
        map_member(bomb, "image")
    with pytest.raises(ValueError, match="Python objects"):
        map_member(npz_with(tmp_path / "o.npz", "(8,)", "|O"), "image")


def test_a_gzip_bomb_is_not_unpacked(tmp_path):
    path = tmp_path / "images.gz"
    with gzip.open(path, "wb") as file:
        file.write(b"\0\0\x08\x01" + struct.pack(">i", 100))
        for _ in range(200):
            file.write(bytes(2**20))
    with pytest.raises(ValueError, match="cut short or damaged"):
        read_idx(path)
    path.write_bytes(b"")
    with gzip.open(path, "wb") as file:
        file.write(b"\0\0\x08\x03" + struct.pack(">iii", 2**31 - 1, 2**31 - 1, 4))
    with pytest.raises(ValueError, match="claims"):
        read_idx(path)


def tar_with(folder, *members: tuple[str, bytes], kind: bytes = tarfile.REGTYPE):
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "train-0.tar", "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size, member.type = len(content), kind
            member.linkname = "/etc/passwd" if kind != tarfile.REGTYPE else ""
            archive.addfile(member, io.BytesIO(content))
    return DataConfig(source="webdataset", root=str(folder))


@pytest.mark.parametrize("name", ["../../etc/cron.d/a.jpg", "/etc/a.jpg", "x/../../a.jpg"])
def test_shards_whose_names_lead_out_are_refused(tmp_path, digit_jpegs, name):
    config = tar_with(tmp_path / "shards", (name, digit_jpegs[0][0]), (name.replace("jpg", "cls"), b"0"))
    with pytest.raises(ValueError, match="outside of the archive; refused"):
        build_source(config, "train")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "images") == ["shards"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE], ids=["symbolic", "hard"])
def test_links_in_shards_are_not_followed(tmp_path, kind):
    with pytest.raises(ValueError, match="hold no images"):
        build_source(tar_with(tmp_path / "shards", ("a.jpg", b""), kind=kind), "train")


def test_a_label_of_megabytes_is_no_label(tmp_path, digit_jpegs):
    config = tar_with(tmp_path / "shards", ("a.jpg", digit_jpegs[0][0]), ("a.json", b'{"label": ' + bytes(3 * 2**20)))
    with pytest.raises(ValueError, match="holds no class number"):
        build_source(config, "train")


def test_a_hostile_index_is_not_believed(image_folder, tmp_path, monkeypatch):
    """An index that came with the data names files elsewhere: they are not read as images of this data set."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = DataConfig(source="folder", root=str(image_folder))
    time.sleep(0.15)  # an index of what changed just now is not kept
    build_source(config, "train")
    path = image_folder / ".mimir_fast" / "train.npz"
    arrays = dict(np.load(path))
    arrays["paths"] = np.array([b"../../../../etc/passwd"] * 25)
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match="outside"):
        build_source(config, "train")


def test_grey_levels_of_sixteen_bits_are_scaled() -> None:
    """PIL's own conversion cuts off what is above 255: a ramp becomes white."""
    ramp = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    file = io.BytesIO()
    Image.fromarray(ramp).save(file, "PNG")
    pixels = decode(file.getvalue(), "here")
    assert pixels.shape == (32, 32, 1) and np.array_equal(pixels[..., 0], ramp >> 8)
    file = io.BytesIO()
    Image.fromarray(ramp.astype(np.float32)).save(file, "TIFF")
    with pytest.raises(UnreadableImageError, match="save it with 8 or 16 bits"):
        decode(file.getvalue(), "here")
