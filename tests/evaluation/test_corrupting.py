"""Corruptions that are made here against the scripts that made ImageNet-C and CIFAR-10-C, on both of their sizes."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mimir_fast.evaluation import corrupting
from mimir_fast.evaluation.corrupting import as_published, available, benchmark_of, corrupt, frost_folder
from mimir_fast.evaluation.corruption_error import CORRUPTIONS, SEVERITIES

GOLDEN = Path(__file__).parents[1] / "golden" / "corruptions"
spec = spec_from_file_location("make_corruptions", GOLDEN / "make.py")
make = module_from_spec(spec)
spec.loader.exec_module(make)


class GlobalDraws:
    """NumPy's old generator, from which the scripts draw, called as the new one is."""

    def __init__(self, seed: int) -> None:
        self.state = np.random.RandomState(seed)
        self.normal, self.uniform, self.poisson = self.state.normal, self.state.uniform, self.state.poisson
        self.random = self.state.random_sample

    def integers(self, low: int, high: int | None = None, size: tuple[int, ...] | None = None) -> np.ndarray:
        return self.state.randint(low, high, size=size)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("kind", ["imagenet", "cifar"])
def test_agrees_with_the_scripts_that_made_the_benchmarks(kind: str, name: str) -> None:
    """Within one of 255, from the same draws; JPEG within what its libraries round differently."""
    if name == "frost" and not frost_folder():
        pytest.skip("pip install --no-deps imagecorruptions")
    picture, saved = make.picture(make.SIZES[kind]), np.load(GOLDEN / "scripts.npz")
    step = len(picture) // 8
    for severity in SEVERITIES if kind == "cifar" else (2, 5):
        found = corrupt(picture, name, severity, GlobalDraws(severity))
        assert found.shape == picture.shape and found.dtype == np.uint8
        distance = np.abs(found[3::step, 1::step].astype(int) - saved[f"{kind}/{name}/{severity}"])
        assert distance.max() <= (4 if name == "jpeg_compression" else 1), severity


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (33, 47), (96, 130)])
def test_any_size_and_the_same_image_for_the_same_draws(size: tuple[int, int], frost_like: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    for name in CORRUPTIONS:
        first, again = (corrupt(x, name, 3, np.random.default_rng(7)) for _ in range(2))
        assert first.shape == x.shape and np.array_equal(first, again)
        assert size == (1, 1) or not np.array_equal(first, x), name
    assert as_published(x).shape == x.shape and (as_published(x) is x) == (min(size) < 96)


@pytest.fixture
def frost_like(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of the photographs' name with five files of one colour."""
    folder = tmp_path / "imagecorruptions" / "frost"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise RuntimeError('imported')\n")
    for name in corrupting.FROST_FILES:
        Image.new("RGB", (60, 50), (200, 100, 40)).save(folder / name, quality=100, subsampling=0)
    monkeypatch.syspath_prepend(tmp_path)
    corrupting._photograph.cache_clear()
    yield folder
    corrupting._photograph.cache_clear()


def test_frost_reads_photographs_and_is_left_out_without(frost_like: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert available() == CORRUPTIONS and frost_folder() == frost_like
    x = np.full((32, 32, 3), 100, np.uint8)
    pixel = corrupt(x, "frost", 5, np.random.default_rng(0))[7, 9].astype(int)
    assert np.abs(pixel - np.array([165, 120, 93])).max() <= 2  # 0.75 · 100 + 0.45 · (200, 100, 40)
    monkeypatch.setattr(corrupting, "FROST_PACKAGE", "no_such_package")
    assert available() == tuple(name for name in CORRUPTIONS if name != "frost")
    corrupting._photograph.cache_clear()
    with pytest.raises(ImportError, match="pip install --no-deps"):
        corrupt(x, "frost", 1, np.random.default_rng(0))


def test_what_is_refused() -> None:
    assert (benchmark_of(32, 32), benchmark_of(224, 224)) == ("cifar-10-c", "imagenet-c")
    x = np.zeros((8, 8, 3), np.uint8)
    for image, name, severity in ((x, "rain", 1), (x, "fog", 6), (x[:, :, 0], "fog", 1), (x / 255, "fog", 1)):
        with pytest.raises(ValueError, match=r"wanted|uint8"):
            corrupt(image, name, severity, np.random.default_rng(0))
