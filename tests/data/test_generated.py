"""Generated (EDM) images: mapped from an npz, mixed with a real source at a ratio, refused when they do not fit."""

import tracemalloc
from itertools import islice

import numpy as np
import pytest
import torch

from mimir_fast.data import DataConfig, build_loader
from mimir_fast.data.npz import map_member
from mimir_fast.data.sources import MissingDataError
from mimir_fast.data.sources.edm import open_npz


def generated_images(count: int, side: int = 32, channels: int = 1) -> np.ndarray:
    """Image i is filled with the value i, so that a batch shows which ones it holds."""
    values = (np.arange(count) % 256).astype(np.uint8)
    return np.broadcast_to(values[:, None, None, None], (count, side, side, channels)).copy()


@pytest.fixture
def npz(tmp_path):
    path = tmp_path / "1m.npz"
    np.savez(path, image=generated_images(200), label=np.arange(200) % 10)
    return path


@pytest.mark.parametrize("fortran", [False, True])
def test_a_member_is_mapped_where_it_lies(tmp_path, fortran):
    first = np.random.Generator(np.random.Philox(0)).integers(0, 256, (7, 5, 4, 3), dtype=np.uint8)
    second = np.arange(11, dtype=np.int64)
    np.savez(tmp_path / "two.npz", image=np.asfortranarray(first) if fortran else first, label=second)
    for name, wanted in (("image", first), ("label", second)):
        mapped = map_member(tmp_path / "two.npz", name)
        assert isinstance(mapped, np.memmap) and not mapped.flags.writeable
        assert (mapped == wanted).all() and mapped.dtype == wanted.dtype


def test_reading_a_few_images_does_not_load_the_file(tmp_path):
    path = tmp_path / "big.npz"
    np.savez(path, image=np.zeros((10_000, 32, 32, 3), np.uint8), label=np.zeros(10_000, np.int64))  # 31 MB
    tracemalloc.start()
    source = open_npz(str(path), num_classes=10)
    assert source.pixels(9_999).shape == (32, 32, 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6


@pytest.mark.parametrize("loader", ["resident", "torch"])
def test_batches_hold_the_ratio_and_every_real_image_once_an_epoch(npz, loader):
    config = DataConfig(
        generated=str(npz), loader=loader, augment="none", flip=False, num_workers=0, limit=30, channels=1
    )
    data = build_loader(config, split="train", batch_size=20, seed=0)
    assert (data.num_samples, data.epoch_length, data.batches_per_epoch) == (30, 100, 5)
    batches = list(islice(data, 10))
    for batch in batches:
        is_generated = batch.samples >= 30
        assert is_generated.sum() == 14
        values = batch.images[is_generated].flatten(1)
        assert torch.equal(values.min(1).values, values.max(1).values)  # filled with one value: its number
        assert torch.equal(values[:, 0].long(), batch.samples[is_generated] - 30)
        assert torch.equal(batch.labels[is_generated], (batch.samples[is_generated] - 30) % 10)
    samples, epochs = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("samples", "epochs"))
    for epoch in (0, 1):
        assert sorted(samples[(samples < 30) & (epochs == epoch)].tolist()) == list(range(30))


def test_mixing_resumes_exactly_and_stays_out_of_evaluation(npz):
    config = DataConfig(generated=str(npz), channels=1)
    data = build_loader(config, split="train", batch_size=16, seed=0)
    whole = list(islice(data, 9))
    other = build_loader(config, split="train", batch_size=16, seed=0)
    list(islice(other, 4))
    third = build_loader(config, split="train", batch_size=16, seed=0)
    third.load_state_dict(other.state_dict())
    for first, second in zip(whole[4:], islice(third, 5), strict=True):
        assert torch.equal(first.images, second.images) and torch.equal(first.samples, second.samples)
    assert sum(len(batch.samples) for batch in build_loader(config, split="test", batch_size=64)) == 300


def test_images_without_labels_get_minus_one(tmp_path):
    np.savez(tmp_path / "bare.npz", image=generated_images(5))
    assert open_npz(str(tmp_path / "bare.npz"), 10).labels.tolist() == [-1] * 5


def test_a_file_without_images_lists_what_it_has(tmp_path):
    np.savez(tmp_path / "odd.npz", images=generated_images(5), label=np.arange(5))
    with pytest.raises(ValueError, match="no array 'image'; it has images, label"):
        build_loader(DataConfig(generated=str(tmp_path / "odd.npz")), split="train", batch_size=2)


def test_files_that_do_not_fit_are_refused(tmp_path, npz):
    def build(path, **options):
        return build_loader(DataConfig(generated=str(path), **options), split="train", batch_size=2)

    with pytest.raises(MissingDataError, match=r"nowhere\.npz does not exist"):
        build(tmp_path / "nowhere.npz")
    with pytest.raises(ValueError, match="32 pixels wide, those of digits 16"):
        build(npz, image_size=16)
    np.savez(tmp_path / "colour.npz", image=generated_images(4, channels=3))
    with pytest.raises(ValueError, match="3 channels, those of digits 1"):
        build(tmp_path / "colour.npz")
    np.savez(tmp_path / "float.npz", image=np.zeros((4, 32, 32, 3)))
    with pytest.raises(ValueError, match="must be uint8"):
        build(tmp_path / "float.npz")
    np.savez(tmp_path / "labels.npz", image=generated_images(4), label=[0, 1, 2, 10])
    with pytest.raises(ValueError, match="label 10 but the real source has 10 classes"):
        build(tmp_path / "labels.npz")
    np.savez_compressed(tmp_path / "small.npz", image=generated_images(4))
    with pytest.raises(ValueError, match=r"save it again with np\.savez"):
        build(tmp_path / "small.npz")
    (tmp_path / "cut.npz").write_bytes(npz.read_bytes()[:5000])
    with pytest.raises(ValueError, match="not a whole npz"):
        build(tmp_path / "cut.npz")
