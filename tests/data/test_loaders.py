"""What holds for all three loaders: the same samples, resuming, ranks, bad files, evaluation in one pass."""

import gc
import io
import json
import multiprocessing
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mimir_fast.data import DataConfig, build_loader, build_source
from mimir_fast.data import decode as decode_module
from mimir_fast.data.decode import UnreadableImageError, checked_file, decode
from mimir_fast.data.loaders.dali import DaliLoader, _define_pipeline, _Feed
from mimir_fast.data.loaders.skip import SkipLedger, TooManyBadFilesError
from mimir_fast.data.order import KeyStream
from mimir_fast.data.prepare import prepare
from mimir_fast.data.prepare_config import PrepareConfig

LOADERS = ["resident", "torch", "dali"]


@pytest.fixture(params=LOADERS)
def config(request, image_folder) -> DataConfig:
    """A folder of real JPEG files through one of the loaders."""
    if request.param == "dali":
        pytest.importorskip("nvidia.dali")
    augment = "pad_crop" if request.param == "resident" else "resized_crop"
    root = str(image_folder)
    return DataConfig(source="folder", root=root, image_size=48, loader=request.param, augment=augment, num_workers=0)


def take(config, count, start=None, **options):
    """The next `count` micro-batches, and the state after them."""
    loader = build_loader(config, **{"split": "train", "batch_size": 4, "seed": 5, **options})
    if start is not None:
        loader.load_state_dict(start)
    batches = list(islice(loader, count))
    state = loader.state_dict()
    loader.close()
    return batches, state


def equal(first, second):
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in vars(first))


def test_batches_are_uint8_images_with_labels(config):
    batches, _ = take(config, 7)
    for batch in batches:
        assert batch.images.shape == (4, 3, 48, 48) and batch.images.dtype == torch.uint8
        assert all(column.dtype == torch.int64 for column in (batch.labels, batch.samples, batch.epochs))
        assert batch.images.float().std() > 20  # pictures, not an empty buffer
    samples, epochs = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("samples", "epochs"))
    assert sorted(samples[epochs == 0].tolist()) == list(range(25))  # the seventh batch straddles two epochs
    assert batches[6].epochs.tolist() == [0, 1, 1, 1]


def test_a_sample_looks_different_in_the_next_epoch_and_the_same_in_the_next_run(config):
    batches, _ = take(config, 13)
    images, samples = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("images", "samples"))
    first, second = images[:25][samples[:25].argsort()], images[25:50][samples[25:50].argsort()]
    assert (first != second).flatten(1).any(1).float().mean() > 0.9
    assert all(equal(a, b) for a, b in zip(batches, take(config, 13)[0], strict=True))


@pytest.mark.parametrize("stop", [1, 5, 8])
def test_resuming_in_the_middle_of_an_epoch_is_exact(config, stop):
    whole, _ = take(config, 10)
    _, state = take(config, stop)
    rest, _ = take(config, 10 - stop, start=state)
    assert all(equal(a, b) for a, b in zip(whole[stop:], rest, strict=True))


def test_two_ranks_together_are_one(config):
    whole, _ = take(config, 5, batch_size=6)
    ranks = [take(config, 5, batch_size=3, rank=rank, world_size=2)[0] for rank in (0, 1)]
    accumulated, _ = take(config, 10, batch_size=3, accum_iter=2)
    for step, batch in enumerate(whole):
        for name in vars(batch):
            wanted = getattr(batch, name)
            assert torch.equal(torch.cat([getattr(ranks[rank][step], name) for rank in (0, 1)]), wanted)
            assert torch.equal(torch.cat([getattr(accumulated[2 * step + micro], name) for micro in (0, 1)]), wanted)


def test_a_run_goes_on_with_other_ranks_and_another_batch_size(config):
    whole, _ = take(config, 12, batch_size=1)
    _, state = take(config, 2, batch_size=2, rank=1, world_size=2)
    assert state["position"] == 8
    rest, _ = take(config, 1, start=state, batch_size=4)
    assert rest[0].samples.tolist() == [int(batch.samples) for batch in whole[8:12]]


def test_evaluation_is_one_pass_in_order_split_over_ranks(config):
    seen = []
    for rank in range(3):
        loader = build_loader(config, split="test", batch_size=2, rank=rank, world_size=3)
        for _ in range(2):  # a second pass gives the same
            batches = list(loader)
            assert all(len(batch.samples) <= 2 for batch in batches)
        seen += torch.cat([batch.samples for batch in batches]).tolist()
        loader.close()
    assert sorted(seen) == list(range(8))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_pass_broken_off_begins_anew(config, num_workers):
    config.num_workers = num_workers
    loader = build_loader(config, split="test", batch_size=2)
    assert next(iter(loader)).samples.tolist() == [0, 1]
    for _ in range(2):
        assert torch.cat([batch.samples for batch in loader]).tolist() == list(range(8))
    loader.close()


def test_unreadable_files_are_skipped_counted_and_named(config, damaged_folder, caplog):
    loader = build_loader(config, split="train", batch_size=7, seed=1)
    batches = list(islice(loader, 8))
    assert all(batch.images.shape == (7, 3, 48, 48) for batch in batches)
    assert sorted(path.rsplit("/", 1)[1] for path in loader.skipped) == ["cut.jpg", "notes.jpg", "zero.jpg"]
    assert caplog.text.count("skipped file") == 3 and "skipped file 3 (of 50 allowed): " in caplog.text
    labels = torch.from_numpy(build_source(config, "train").labels)
    assert all(torch.equal(batch.labels, labels[batch.samples]) for batch in batches)  # of what came in its place
    assert len(set(torch.cat([batch.samples for batch in batches[:4]]).tolist())) == 25  # each good one came
    repeated = list(islice(build_loader(config, split="train", batch_size=7, seed=1), 8))
    assert all(equal(a, b) for a, b in zip(batches, repeated, strict=True))
    loader.close()


def test_too_many_unreadable_files_stop_the_run(config, damaged_folder):
    config.max_bad_files = 2
    with pytest.raises(TooManyBadFilesError, match=r"3 unreadable files.*max_bad_files(.|\n)*(cut|notes|zero)"):
        take(config, 8)


def test_state_of_another_stream_is_refused(config):
    _, state = take(config, 2)
    with pytest.raises(ValueError, match="seed = 5, this one has 6"):
        take(config, 1, start=state, seed=6)
    with pytest.raises(ValueError, match="num_samples"):
        take(config, 1, start={**state, "num_samples": 1000})


def test_a_few_files_gone_or_come_do_not_end_a_run(caplog):
    """`repair or remove them` is what the message about bad files says; resuming must then work, and say so."""
    config = DataConfig(limit=1000)
    _, state = take(config, 3)
    batches, _ = take(DataConfig(limit=995), 1, start=state)
    assert "had 1000 samples when this run was saved and has 995 now" in caplog.text
    assert len(batches[0].samples) == 4
    with pytest.raises(ValueError, match="num_samples = 1000, this one has 900"):
        take(DataConfig(limit=900), 1, start=state)


def test_a_stream_that_another_version_ordered_is_gone_on_with_and_said(caplog):
    _, state = take(DataConfig(), 3)
    del state["order"]
    take(DataConfig(), 1, start=state)
    assert "saved under another order of samples" in caplog.text


def test_state_within_an_accumulated_step_needs_the_same_cut(config):
    whole, _ = take(config, 6, batch_size=2, accum_iter=3)
    _, state = take(config, 2, batch_size=2, accum_iter=3)
    assert state["micro_step"] == 2
    rest, _ = take(config, 4, start=state, batch_size=2, accum_iter=3)
    assert all(equal(a, b) for a, b in zip(whole[2:], rest, strict=True))
    with pytest.raises(ValueError, match="within a step"):
        take(config, 1, start=state, batch_size=2, accum_iter=1)


def test_moving_a_loader_under_an_iterator_is_refused(config):
    loader = build_loader(config, split="train", batch_size=4)
    batches = iter(loader)
    next(batches)
    loader.load_state_dict(loader.state_dict())
    with pytest.raises(RuntimeError, match="call iter"):
        next(batches)
    loader.close()


def test_the_global_random_state_is_left_alone(config):
    torch.manual_seed(0)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    take(config, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()


def test_waiting_is_counted(config):
    loader = build_loader(config, split="train", batch_size=4)
    assert loader.wait_seconds == 0
    list(islice(loader, 2))
    assert loader.wait_seconds > 0
    loader.close()


def test_grey_batches(config):
    config.channels = 1
    (batch,), _ = take(config, 1)
    assert batch.images.shape == (4, 1, 48, 48) and batch.images.float().std() > 10


def test_dali_workers_can_be_started_afresh(image_folder, monkeypatch):
    """As on a GPU, where processes cannot be forked: what they need is sent to them."""
    pytest.importorskip("nvidia.dali")
    config = DataConfig(source="folder", root=str(image_folder), image_size=48, loader="dali", num_workers=1)
    forked, _ = take(config, 2)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    spawned, _ = take(config, 2)
    assert all(equal(a, b) for a, b in zip(forked, spawned, strict=True))


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_closing_ends_the_worker_processes(image_folder, loader):
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    config = DataConfig(source="folder", root=str(image_folder), image_size=48, loader=loader, num_workers=2)
    before = set(multiprocessing.active_children())
    data = build_loader(config, split="train", batch_size=4)
    batches = iter(data)
    next(batches)
    assert len(set(multiprocessing.active_children()) - before) == 2
    data.close()
    del batches
    gc.collect()
    assert set(multiprocessing.active_children()) <= before


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_worker_processes_give_what_the_main_process_gives(image_folder, loader):
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    root = str(image_folder)
    config = DataConfig(source="folder", root=root, image_size=48, loader=loader, augment="resized_crop", num_workers=0)
    here, _ = take(config, 8)
    config.num_workers = 2
    there, state = take(config, 8)
    assert all(equal(a, b) for a, b in zip(here, there, strict=True))
    assert state["position"] == 32  # what was consumed, not what the workers have read ahead
    evaluation = build_loader(config, split="test", batch_size=3)
    passes = [list(evaluation), list(evaluation)]
    assert [len(batch.samples) for batch in passes[0]] == [3, 3, 2]
    assert all(equal(a, b) for a, b in zip(*passes, strict=True))
    evaluation.close()


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("augment", ["resized_crop", "pad_crop", "none"])
def test_torch_and_dali_give_the_same_pixels(image_folder, augment, channels):
    """Bit for bit on a CPU: DALI decodes as PIL does, even a part of a file, and both cut with the same op."""
    pytest.importorskip("nvidia.dali")
    photograph = Image.open(image_folder / "train" / "digit_0" / "china.jpg")
    photograph.convert("L").save(image_folder / "train" / "digit_1" / "grey.jpg", quality=80, progressive=True)
    photograph.crop((0, 0, 211, 97)).save(image_folder / "train" / "digit_1" / "whole.png")
    photograph.convert("CMYK").crop((0, 0, 97, 211)).save(image_folder / "train" / "digit_1" / "four.jpg")
    batches = {}
    for loader in ("torch", "dali"):
        config = DataConfig(
            source="folder", root=str(image_folder), image_size=48, loader=loader, augment=augment, channels=channels,
            num_workers=0,
        )  # fmt: skip
        batches[loader], _ = take(config, 8)
    for ours, theirs in zip(batches["torch"], batches["dali"], strict=True):
        assert equal(ours, theirs)


@pytest.mark.parametrize("augment", ["resized_crop", "pad_crop", "none"])
def test_the_pipeline_of_a_gpu_cuts_the_same_pixels(image_folder, augment):
    """There DALI does the cut as well. Here its decoder is the CPU's: only the resamplers' rounding may differ."""
    pytest.importorskip("nvidia.dali")
    config = DataConfig(
        source="folder", root=str(image_folder), image_size=48, loader="torch", augment=augment, num_workers=1
    )
    loader = build_loader(config, split="train", batch_size=4, seed=5)
    keys = KeyStream(loader.order, loader.plan)
    feed = _Feed(build_source(config, "train"), config, keys, True, frozenset(), dali_cuts=True)
    pipeline = _define_pipeline(feed, 2, {"device": "cpu"})(batch_size=4, num_threads=1, device_id=None)
    for batch in islice(loader, 7):
        images, samples = (torch.from_numpy(np.array(output.as_tensor())) for output in pipeline.run())
        assert torch.equal(samples.flatten(), batch.samples)
        difference = (images.float() - batch.images.float()).abs()
        assert difference.mean() < 0.5 and difference.max() < 16
    loader.close()


def test_damage_inside_a_jpeg_is_judged_alike_by_torch_and_dali(image_folder, monkeypatch):
    """Bytes overwritten in the middle, ends intact: DALI fails at some and goes on, and the stream stays in step.

    It decodes the part that a crop needs, so it may take a file whose damage lies elsewhere; PIL judges whole files.
    """
    pytest.importorskip("nvidia.dali")
    random = np.random.Generator(np.random.Philox(0))
    files = sorted((image_folder / "train").glob("*/*.jpg"))[::2]
    for file in files:
        content = bytearray(file.read_bytes())
        for place in random.integers(2, len(content) - 2, 20):
            content[place] = random.integers(256)
        file.write_bytes(content)
    results, skipped = {}, {}
    builds: list[KeyStream] = []
    build = DaliLoader._build
    monkeypatch.setattr(DaliLoader, "_build", lambda self, keys: (builds.append(keys), build(self, keys)))
    for loader in ("torch", "dali"):
        config = DataConfig(
            source="folder", root=str(image_folder), image_size=48, loader=loader, augment="resized_crop", num_workers=0
        )
        data = build_loader(config, split="train", batch_size=4, seed=5)
        results[loader], skipped[loader] = list(islice(data, 14)), set(data.skipped)
        data.close()
    assert skipped["dali"] <= skipped["torch"]
    broken = [path for path in skipped["dali"] if passes_at_a_glance(path)]
    assert broken  # some were given to DALI, which failed on them
    assert len(builds) == 1  # one bad batch costs that batch, not all that were begun
    source, differing = build_source(config, "train"), 0
    for ours, theirs in zip(results["torch"], results["dali"], strict=True):
        for row, sample in enumerate(theirs.samples.tolist()):
            if sample == ours.samples[row]:
                assert torch.equal(ours.images[row], theirs.images[row])
            else:
                assert source.where(sample) in skipped["torch"]
                differing += 1
    assert differing <= 4  # of 56


def passes_at_a_glance(path: str) -> bool:
    """Whether a damaged file gets past the check of header and end."""
    try:
        checked_file(Path(path).read_bytes(), path)
    except UnreadableImageError:
        return False
    return True


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_shards_go_through_every_file_loader(shards, digit_jpegs, loader):
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    config = DataConfig(
        source="webdataset", root=str(shards), image_size=48, loader=loader, augment="resized_crop", num_workers=2
    )
    batches, _ = take(config, 6)
    assert sorted(torch.cat([batch.samples for batch in batches]).tolist()) == list(range(24))
    for batch in batches:
        assert batch.labels.tolist() == [digit_jpegs[sample][1] for sample in batch.samples]
        assert batch.images.float().std() > 20


def test_the_photograph_arrives_whole(image_folder):
    """The evaluation crop of a real photograph, against PIL by hand."""
    path = image_folder / "val" / "digit_0" / "flower.jpg"
    config = DataConfig(source="folder", root=str(image_folder), image_size=224, loader="torch", num_workers=0)
    loader = build_loader(config, split="test", batch_size=8)
    (batch,) = list(loader)
    names = sorted(path.parent.iterdir())
    picture = Image.open(path)
    resized = picture.resize((int(256 * picture.width / picture.height), 256), Image.Resampling.BICUBIC)
    left = round((resized.width - 224) / 2)
    wanted = np.asarray(resized.crop((left, 16, left + 224, 240))).transpose(2, 0, 1)
    assert (batch.images[names.index(path)].numpy() == wanted).all()


def test_a_file_that_was_unreadable_for_a_moment_is_reported_too(image_folder):
    """A sick disk: a worker could not read sample 3 and took 4, now 3 is fine. Sample -1: it found nothing at all."""
    source = build_source(DataConfig(source="folder", root=str(image_folder)), "train")
    ledger = SkipLedger(source, max_bad_files=1, skipped={})
    ledger.compare(np.array([2, 3]), np.array([2, 4]))
    assert list(ledger.skipped) == [source.where(3)] and "at first" in ledger.skipped[source.where(3)]
    with pytest.raises(TooManyBadFilesError, match="max_bad_files = 1"):
        ledger.compare(np.array([24]), np.array([-1]))
    assert set(ledger.skipped) == {source.where(index) for index in (3, 24, 0)}  # the search went around the end


def test_torchvision_decodes_what_pil_decodes_and_alike(digit_jpegs, monkeypatch):
    """Sound files and damaged ones: the same pixels, or none."""
    pytest.importorskip("torchvision")
    random = np.random.Generator(np.random.Philox(1))
    files = [content for content, _ in digit_jpegs]
    grey = io.BytesIO()
    Image.open(io.BytesIO(files[0])).convert("L").save(grey, format="JPEG", progressive=True)
    files.append(grey.getvalue())
    for content in files[:25]:
        for count in (1, 4, 16):
            damaged = bytearray(content)
            for place in random.integers(2, len(content) - 2, count):
                damaged[place] = random.integers(256)
            files.append(bytes(damaged))
        files.append(content[: len(content) // 2] + b"\xff\xd9")  # cut, with an end

    def verdicts() -> list[np.ndarray | None]:
        pictures: list[np.ndarray | None] = []
        for content in files:
            try:
                pictures.append(decode(content, "here"))
            except UnreadableImageError:
                pictures.append(None)
        return pictures

    assert decode_module.jpeg_decoder() is not None
    quick = verdicts()
    monkeypatch.setattr(decode_module, "jpeg_decoder", lambda: None)
    for ours, pil in zip(quick, verdicts(), strict=True):
        assert (ours is None) == (pil is None) and (pil is None or np.array_equal(ours, pil))
    assert 10 < sum(picture is None for picture in quick) < len(files) - 25


def test_bad_bytes_name_their_path():
    with pytest.raises(UnreadableImageError, match=r"a/b\.jpg"):
        decode(b"\xff\xd8\xff\xe0 garbage", "a/b.jpg")


@pytest.mark.parametrize("augment", ["pad_crop", "none"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_resident_images_are_those_of_the_other_loaders(image_folder, augment, split):
    """Of files of many shapes, and shifted past the edge of the longer side: what lies there comes in, not zeros."""
    config = DataConfig(
        source="folder", root=str(image_folder), image_size=48, augment=augment, crop_padding=7, num_workers=1
    )
    batches = {}
    for loader in ("torch", "resident"):
        batches[loader], _ = take(replace(config, loader=loader), 3, split=split)
    for ours, theirs in zip(batches["torch"], batches["resident"], strict=True):
        assert equal(ours, theirs)


def test_a_run_goes_on_with_moved_data_only_if_they_are_the_same(image_folder, tmp_path):
    config = DataConfig(source="folder", root=str(image_folder), image_size=48, num_workers=0, loader="torch")
    whole, _ = take(config, 4)
    _, state = take(config, 2)
    assert len(json.dumps(state)) < 5000
    moved = Path(shutil.copytree(image_folder, tmp_path / "moved"))
    rest, _ = take(replace(config, root=str(moved)), 2, start=state)
    assert all(equal(a, b) for a, b in zip(whole[2:], rest, strict=True))
    renamed = Path(shutil.copytree(image_folder, tmp_path / "renamed"))
    (renamed / "train" / "digit_2").rename(renamed / "train" / "zebra")
    with pytest.raises(ValueError, match="had other classes when it was saved"):
        take(replace(config, root=str(renamed)), 1, start=state)
    others = Path(shutil.copytree(image_folder, tmp_path / "others"))
    for path in (others / "train").rglob("*.jpg"):
        path.rename(path.with_name(f"other-{path.name}"))
    with pytest.raises(ValueError, match="of 25 names or contents 0 are the same"):
        take(replace(config, root=str(others)), 1, start=state)
    del state["data"]  # of an older version
    take(replace(config, root=str(others)), 1, start=state)


@pytest.mark.parametrize("source", ["raw", "webdataset", "images"])
def test_other_data_are_told_by_every_source(image_folder, tmp_path, source):
    """Of equally many images, and the raw ones of equal shape."""
    states = []
    for name, tint in (("one", 1.0), ("two", 0.9)):
        root = Path(shutil.copytree(image_folder, tmp_path / name / "files"))
        for path in root.rglob("*.jpg"):
            pixels = np.asarray(Image.open(path).resize((64, 64)))
            Image.fromarray((pixels * tint).astype(np.uint8)).save(path)
            if source == "images":
                path.rename(path.with_name(name + path.name))
        if source != "images":
            prepare(PrepareConfig(str(root), str(tmp_path / name / "out"), format=source, num_workers=1))
        root = root if source == "images" else tmp_path / name / "out"
        config = DataConfig(source=source, root=str(root), image_size=48, num_workers=0)
        states.append(take(config, 1)[1])
    take(config, 1, start=states[1])
    with pytest.raises(ValueError, match="were other files when it was saved"):
        take(config, 1, start=states[0])
