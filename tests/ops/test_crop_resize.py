"""Crop and resize of uint8 images: PIL's pixels, bit for bit, whoever computes them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mimir_fast import _native
from mimir_fast.ops.crop_resize import (
    PLAN,
    crop_resize,
    crop_resize_directly,
    crop_resize_reference,
    most_taps_of,
    taps,
)

Job = tuple[int, ...]  # a row of the plan without its offset
SIDE = 33
JOBS: dict[str, list[Job]] = {
    # height, width, box y, x, height, width, resized to, anchor y, x, mirror
    "crop": [(60, 80, 5, 7, 40, 50, SIDE, SIDE, 0, 0, 0), (60, 80, 5, 7, 40, 50, SIDE, SIDE, 0, 0, 1)],
    "whole": [(47, 31, 0, 0, 47, 31, SIDE, SIDE, 0, 0, 1)],
    "evaluation": [(60, 90, 0, 0, 60, 90, 38, 57, 2, 12, 0)],
    "shifted, zeros outside": [(SIDE, SIDE, 0, 0, SIDE, SIDE, SIDE, SIDE, -4, 3, 1)],
    "one pixel": [(1, 1, 0, 0, 1, 1, SIDE, SIDE, 0, 0, 0), (50, 50, 20, 20, 1, 1, SIDE, SIDE, 0, 0, 0)],
    "nothing but outside": [(9, 9, 0, 0, 9, 9, SIDE, SIDE, 100, 0, 0)],
    "much smaller": [(300, 200, 3, 1, 290, 190, SIDE, SIDE, 0, 0, 0)],
    "mixed": [(20, 30, 1, 2, 15, 20, SIDE, SIDE, 0, 0, 1), (90, 33, 0, 0, 90, 33, 70, 40, 9, -3, 0)],
}


def make(jobs: list[Job], channels: int, device: torch.device | str = "cpu", seed: int = 0):
    """Random images one after the other, and their plan."""
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randint(0, 256, (job[0], job[1], channels), dtype=torch.uint8, generator=generator) for job in jobs]
    offsets = np.cumsum([0, *(image.numel() for image in images)])[:-1]
    plan = torch.tensor([[offset, *job] for offset, job in zip(offsets.tolist(), jobs, strict=True)])
    return torch.cat([image.flatten() for image in images]).to(device), plan.reshape(-1, len(PLAN)), images


def by_pil(image: torch.Tensor, job: Job, side: int) -> np.ndarray:
    _, _, y, x, height, width, new_height, new_width, top, left, mirror = job
    picture = Image.fromarray(image.squeeze(2).numpy())
    picture = picture.resize((new_width, new_height), Image.Resampling.BICUBIC, box=(x, y, x + width, y + height))
    cut = np.asarray(picture.crop((left, top, left + side, top + side))).reshape(side, side, -1).transpose(2, 0, 1)
    return cut[:, :, ::-1] if mirror else cut


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("jobs", JOBS.values(), ids=JOBS)
def test_matches_definition(jobs, channels, device):
    pixels, plan, _ = make(jobs, channels, device)
    wanted = crop_resize_reference(pixels.cpu(), plan, SIDE, channels)
    for op in (crop_resize, crop_resize_directly):
        assert torch.equal(op(pixels, plan, side=SIDE, channels=channels).cpu(), wanted)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [1, 7, 16, 50])
def test_odd_sides(side, channels):
    jobs = [(40, 41, 3, 4, 30, 31, side, side, 0, 0, 1), (13, 64, 0, 0, 13, 64, side + 3, 2 * side, 1, 2, 0)]
    pixels, plan, _ = make(jobs, channels)
    got = crop_resize(pixels, plan, side=side, channels=channels)
    assert torch.equal(got, crop_resize_reference(pixels, plan, side, channels))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("jobs", JOBS.values(), ids=JOBS)
def test_the_definition_is_pils(jobs, channels):
    """Bit for bit. Pillow up to 12 resizes the rows first, as we do; from 13 on, for some shapes, the columns."""
    pixels, plan, images = make(jobs, channels)
    got = crop_resize_reference(pixels, plan, SIDE, channels)
    for row, (image, job) in enumerate(zip(images, jobs, strict=True)):
        theirs = by_pil(image, job, SIDE)
        columns_first = by_columns_first(image, job, channels)
        assert (got[row].numpy() == theirs).all() or (columns_first.numpy() == theirs).all()


def by_columns_first(image: torch.Tensor, job: Job, channels: int) -> torch.Tensor:
    """The definition of the transposed image, transposed back."""
    height, width, y, x, box_height, box_width, new_height, new_width, top, left, mirror = job
    turned = (width, height, x, y, box_width, box_height, new_width, new_height, left, top, 0)
    pixels = image.transpose(0, 1).contiguous().flatten()
    (result,) = crop_resize_reference(pixels, torch.tensor([[0, *turned]]), SIDE, channels).transpose(2, 3)
    return result.flip(2) if mirror else result


def test_a_photograph_is_within_a_few_levels_of_pil_whatever_it_does_first():
    """Where Pillow 13 resizes along the columns first, rounding in between differs."""
    from sklearn.datasets import load_sample_images

    image = torch.from_numpy(load_sample_images().images[0].copy())
    height, width = image.shape[:2]
    rng = np.random.Generator(np.random.Philox(0))
    for _ in range(12):
        h, w = rng.integers(60, height), rng.integers(60, width)
        job = (height, width, rng.integers(0, height - h), rng.integers(0, width - w), h, w, 96, 96, 0, 0, 0)
        job = tuple(int(number) for number in job)
        plan = torch.tensor([[0, *job]])
        got = crop_resize(image.flatten(), plan, side=96)[0].numpy().astype(int)
        difference = np.abs(got - by_pil(image, job, 96))
        assert difference.max() <= 8 and difference.mean() < 0.15


@given(
    length=st.integers(1, 400), cut=st.tuples(st.floats(0, 1), st.floats(0, 1)), resized=st.integers(1, 300)
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_weights_sum_to_one(length, cut, resized):
    """Up to the rounding of each; and no tap leaves the image."""
    start = int(cut[0] * (length - 1))
    extent = 1 + int(cut[1] * (length - start - 1))
    pixels, weights = taps(torch.arange(resized), length, start, extent, resized)
    assert pixels.min() >= 0 and pixels.max() < length
    assert (weights.sum(1) - 2**22).abs().max() <= weights.shape[1]


def test_same_without_the_native_kernel(monkeypatch):
    pixels, plan, _ = make(JOBS["mixed"], 3)
    with_kernel = crop_resize(pixels, plan, side=SIDE)
    monkeypatch.setattr(_native, "has", lambda function: False)
    assert torch.equal(crop_resize(pixels, plan, side=SIDE), with_kernel)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["crop", "evaluation", "shifted, zeros outside", "one pixel", "mixed"])
def test_triton_kernel(name, channels, triton_device):
    from mimir_kernels import crop_resize as kernels

    pixels, plan, _ = make(JOBS[name], channels, triton_device)
    got = kernels.crop_resize(pixels, plan, SIDE, channels, most_taps_of(plan.tolist()))
    assert torch.equal(got.cpu(), crop_resize_reference(pixels.cpu(), plan, SIDE, channels))


@pytest.mark.parametrize("size", [(20, 40), (40, 20)])
def test_triton_kernel_of_a_rectangle(size, triton_device):
    from mimir_kernels import crop_resize as kernels

    pixels, plan, _ = make(JOBS["mixed"], 3, triton_device)
    got = kernels.crop_resize(pixels, plan, size, 3, most_taps_of(plan.tolist()))
    assert got.is_contiguous() and torch.equal(got.cpu(), crop_resize_reference(pixels.cpu(), plan, size, 3))


def test_an_empty_batch():
    assert crop_resize(torch.empty(0, dtype=torch.uint8), torch.empty((0, 12), dtype=torch.int64), side=8).shape[0] == 0


def test_registration():
    pixels, plan, _ = make(JOBS["crop"], 3)
    torch.library.opcheck(torch.ops.mimir_fast.crop_resize, (pixels, plan, SIDE, SIDE, 3))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("offset", -1, "outside the buffer"),
        ("offset", 1, "outside the buffer"),
        ("height", 10**6, "outside the buffer"),
        ("box_y", 30, "a box leaves its image"),
        ("box_x", -1, "a box leaves its image"),
        ("new_width", 0, "a size is less than 1"),
        ("box_height", 0, "a size is less than 1"),
    ],
)
def test_a_plan_that_would_read_astray_is_refused(column, value, message):
    pixels, plan, _ = make(JOBS["crop"][:1], 3)
    plan[0, PLAN.index(column)] = value
    with pytest.raises(ValueError, match=message):
        crop_resize(pixels, plan, side=SIDE)
    with pytest.raises(ValueError, match=message):
        crop_resize_directly(pixels, plan, side=SIDE)


def test_refuses_what_it_cannot_take():
    pixels, plan, _ = make(JOBS["crop"], 3)
    with pytest.raises(TypeError, match="uint8"):
        crop_resize(pixels.float(), plan, side=SIDE)
    with pytest.raises(ValueError, match=r"plan must be \(B, 12\)"):
        crop_resize(pixels, plan[:, :5], side=SIDE)
    with pytest.raises(ValueError, match="contiguous buffer"):
        crop_resize(pixels[::2], plan, side=SIDE)
    with pytest.raises(ValueError, match="channels 1 or 3"):
        crop_resize(pixels, plan, side=SIDE, channels=2)
