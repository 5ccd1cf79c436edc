"""Real image files for the tests: scikit-learn's digits as JPEG files of several shapes, and its two photographs."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def jpeg(pixels: np.ndarray, quality: int = 90) -> bytes:
    """(H, W, 3) or (H, W) uint8 as a JPEG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="JPEG", quality=quality)
    return file.getvalue()


@pytest.fixture(scope="session")
def digit_jpegs() -> list[tuple[bytes, int]]:
    """24 JPEG files of tinted digits, between 96 and 143 pixels wide and high, with their labels 0, 1, 2."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    chosen = [index for index in range(200) if digits.target[index] < 3][:24]
    files = []
    for number, index in enumerate(chosen):
        size = (96 + 2 * number, 143 - number)
        grey = Image.fromarray((digits.images[index] * 15).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
        tint = np.array([1.0, 0.5 + number / 48, 1 - number / 48])
        files.append((jpeg((np.asarray(grey)[:, :, None] * tint).astype(np.uint8)), int(digits.target[index])))
    return files


@pytest.fixture
def image_folder(tmp_path, digit_jpegs) -> Path:
    """root/{train,val}/<class>/*.jpg: 24 digits to train on, 7 to test on, and a photograph in each."""
    import sklearn.datasets

    photographs = Path(sklearn.datasets.__file__).parent / "images"
    for split, files, photograph in (("train", digit_jpegs, "china.jpg"), ("val", digit_jpegs[:7], "flower.jpg")):
        for number, (content, label) in enumerate(files):
            folder = tmp_path / "images" / split / f"digit_{label}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number:03}.jpg").write_bytes(content)
        (tmp_path / "images" / split / "digit_0" / photograph).write_bytes((photographs / photograph).read_bytes())
    return tmp_path / "images"


@pytest.fixture
def damaged_folder(image_folder) -> Path:
    """The same with three bad files among the training images: cut short, text, empty."""
    folder = image_folder / "train" / "digit_1"
    whole = sorted(folder.iterdir())[0].read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "notes.jpg").write_text("not an image")
    (folder / "zero.jpg").write_bytes(b"")
    return image_folder


@pytest.fixture
def shards(tmp_path, digit_jpegs, monkeypatch) -> Path:
    """Two training shards and one for testing, written by the webdataset library."""
    import webdataset

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "shards"
    folder.mkdir()
    for name, files in (("train-00", digit_jpegs[:10]), ("train-01", digit_jpegs[10:]), ("val-00", digit_jpegs[:5])):
        with webdataset.TarWriter(str(folder / f"{name}.tar")) as writer:
            for number, (content, label) in enumerate(files):
                entry = {"cls": label} if number % 2 else {"json": {"label": label}}
                writer.write({"__key__": f"{name}/{number:04}", "jpg": content, **entry})
    return folder
