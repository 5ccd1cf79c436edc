"""`build_loader`: which loader `auto` stands for, and what does not go together."""

import sys
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from mimir_fast.data import DataConfig, build, build_loader, build_source
from mimir_fast.data.loaders import dali
from mimir_fast.data.loaders.dali import DaliLoader
from mimir_fast.data.loaders.resident import ResidentLoader
from mimir_fast.data.loaders.workers import WorkerLoader


def test_digits_from_one_line():
    loader = build_loader(DataConfig(source="digits"), split="train", batch_size=128)
    assert isinstance(loader, ResidentLoader)
    batch = next(iter(loader))
    assert batch.images.shape == (128, 3, 32, 32) and batch.images.dtype == torch.uint8
    assert loader.num_samples == 1497 and loader.batches_per_epoch == 12


def test_small_data_is_resident_and_large_goes_through_workers(image_folder):
    cpu, folder = torch.device("cpu"), DataConfig(source="folder", root=str(image_folder), augment="resized_crop")
    digits, files = build_source(DataConfig(), "train"), build_source(folder, "train")
    assert build.choose_loader(digits, DataConfig(), cpu, augment=True) == "resident"
    assert build.choose_loader(digits, DataConfig(resident_gib=1e-3), cpu, augment=True) == "torch"
    assert build.choose_loader(files, folder, cpu, augment=True) == "torch"
    assert build.choose_loader(files, replace(folder, loader="dali"), cpu, augment=True) == "dali"


def test_files_on_a_gpu_take_dali_or_say_once_why_not(image_folder, monkeypatch, caplog):
    """Choosing touches no device, so this runs without one."""
    config = DataConfig(source="folder", root=str(image_folder), augment="resized_crop")
    source, gpu = build_source(config, "train"), torch.device("cuda", 0)
    pytest.importorskip("nvidia.dali")
    assert build.choose_loader(source, config, gpu, augment=True) == "dali"
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert build.choose_loader(source, config, gpu, augment=True) == "torch"
    assert "nvidia-dali-cuda130" in caplog.text


def test_a_missing_or_wrong_dali_names_the_right_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ImportError, match=r"pip install nvidia-dali-cuda1[23]0"):
        dali.import_dali()
    placeholder = type(sys)("nvidia.dali")
    monkeypatch.setitem(sys.modules, "nvidia.dali", placeholder)
    nvidia = pytest.importorskip("nvidia")
    monkeypatch.setattr(nvidia, "dali", placeholder, raising=False)
    with pytest.raises(ImportError, match="empty placeholder"):
        dali.import_dali()


def test_what_does_not_go_together_is_refused(image_folder):
    with pytest.raises(ValueError, match=r"use --data\.loader resident"):
        build_loader(DataConfig(loader="dali"), split="train", batch_size=4)
    with pytest.raises(ValueError, match="cannot do resized_crop"):
        build_loader(DataConfig(loader="resident", augment="resized_crop"), split="train", batch_size=4)
    with pytest.raises(ValueError, match="rank must lie in"):
        build_loader(DataConfig(), split="train", batch_size=4, rank=2, world_size=2)


def test_arrays_of_another_size_than_the_models_are_refused(tmp_path):
    records = np.zeros((4, 3073), np.uint8)
    for name in (
        "cifar-10-batches-bin/test_batch.bin",
        *(f"cifar-10-batches-bin/data_batch_{i}.bin" for i in range(1, 6)),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(records.tobytes())
    config = DataConfig(source="cifar10", root=str(tmp_path), image_size=64)
    with pytest.raises(ValueError, match=r"32 x 32 pixels but image_size is 64.*--data.image_size 32"):
        build_loader(config, split="train", batch_size=4)
    with pytest.raises(ValueError, match="32 x 32 pixels but image_size is 64"):
        build_loader(replace(config, augment="resized_crop", loader="resident"), split="test", batch_size=4)
    resized = build_loader(replace(config, augment="resized_crop", num_workers=0), split="train", batch_size=4)
    assert next(iter(resized)).images.shape == (4, 3, 64, 64)


def test_resident_and_workers_agree_on_pad_crop():
    """The same crops of the same array, by tensor ops and by PIL, bit for bit."""
    batches = {}
    for loader in ("resident", "torch"):
        config = DataConfig(loader=loader, num_workers=0)
        batches[loader] = list(islice(build_loader(config, split="train", batch_size=64, seed=3), 3))
    for first, second in zip(batches["resident"], batches["torch"], strict=True):
        assert torch.equal(first.images, second.images) and torch.equal(first.labels, second.labels)


def test_shuffle_and_augment_can_be_chosen_apart_from_the_split():
    config = DataConfig()
    ordered = build_loader(config, split="train", batch_size=500, shuffle=False, augment=False)
    images = torch.cat([batch.images for batch in ordered])
    assert torch.equal(images[:, :1], torch.from_numpy(build_source(config, "train").images))
    shuffled = next(iter(build_loader(config, split="test", batch_size=300, shuffle=True, augment=False)))
    assert sorted(shuffled.samples.tolist()) == list(range(300)) and shuffled.samples[0] != 0


def test_loader_classes_follow_the_name(image_folder):
    pytest.importorskip("nvidia.dali")
    config = DataConfig(source="folder", root=str(image_folder), augment="resized_crop", num_workers=0)
    for name, kind in (("torch", WorkerLoader), ("dali", DaliLoader)):
        assert isinstance(build_loader(replace(config, loader=name), split="train", batch_size=4), kind)


@pytest.mark.cuda
@pytest.mark.parametrize("loader", ["resident", "torch", "dali"])
def test_a_gpu_gets_what_the_cpu_gets(image_folder, loader):
    """The same samples and, up to the GPU decoder's chroma rounding, the same pixels."""
    augment = "pad_crop" if loader == "resident" else "resized_crop"
    root = str(image_folder)
    config = DataConfig(source="folder", root=root, image_size=48, loader=loader, augment=augment, num_workers=2)
    batches = {}
    for device in ("cpu", "cuda"):
        data = build_loader(config, split="train", batch_size=4, device=device, seed=1)
        batches[device] = list(islice(data, 8))
        data.close()
    for host, gpu in zip(batches["cpu"], batches["cuda"], strict=True):
        assert gpu.images.device.type == gpu.samples.device.type == "cuda"
        assert torch.equal(host.samples, gpu.samples.cpu()) and torch.equal(host.labels, gpu.labels.cpu())
        difference = (host.images.float() - gpu.images.cpu().float()).abs()
        assert difference.mean() < (3 if loader == "dali" else 1e-6)
