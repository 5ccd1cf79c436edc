"""Crop, resize, window and mirror as numbers: inside the image, spread as asked, cut alike by every loader."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mimir_fast.data import DataConfig
from mimir_fast.data.crop import cut, to_grey
from mimir_fast.data.geometry import draw_box, draw_mirror, draw_shift, plan_geometry
from mimir_fast.data.loaders.base import to_channels
from mimir_fast.data.loaders.resident import shift_and_mirror
from mimir_fast.ops.crop_resize import crop_resize_reference

MANY = np.arange(20_000)
NOW = np.zeros_like(MANY)


@given(height=st.integers(1, 3000), width=st.integers(1, 3000), seed=st.integers(0, 2**63))
@settings(deadline=None, max_examples=100)
def test_boxes_lie_inside_images_of_any_shape(height, width, seed):
    sizes = np.tile([height, width], (50, 1))
    y, x, h, w = draw_box(seed, MANY[:50], NOW[:50], sizes, (0.2, 1.0), (3 / 4, 4 / 3)).T
    assert (h >= 1).all() and (w >= 1).all() and (y >= 0).all() and (x >= 0).all()
    assert (y + h <= height).all() and (x + w <= width).all()


def test_boxes_have_the_area_and_ratio_asked_for():
    sizes = np.tile([1000, 1000], (len(MANY), 1))
    _, _, height, width = draw_box(0, MANY, NOW, sizes, (0.2, 1.0), (3 / 4, 4 / 3)).T
    area, ratio = height * width / 1e6, width / height
    assert area.min() > 0.199 and 0.2 < np.quantile(area, 0.05) < 0.25 and area.max() > 0.95
    assert ratio.min() > 0.748 and ratio.max() < 1.336  # whole pixels
    assert abs(np.log(ratio).mean()) < 0.01  # log-uniform: wide and high alike


def test_boxes_spread_as_torchvisions_do():
    """The same distribution as the transform everyone trains with; only the source of randomness differs."""
    transforms = pytest.importorskip("torchvision.transforms")
    torch.manual_seed(0)
    image = torch.empty(3, 300, 500)
    theirs = np.array([transforms.RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)])
    ours = draw_box(0, MANY[:4000], NOW[:4000], np.tile([300, 500], (4000, 1)), (0.2, 1.0), (3 / 4, 4 / 3))
    for column in range(4):
        quantiles = np.linspace(0.05, 0.95, 10)
        difference = np.quantile(ours[:, column], quantiles) - np.quantile(theirs[:, column], quantiles)
        assert np.abs(difference).max() < 15  # pixels, of 300 x 500


def test_an_image_too_long_for_any_box_gives_its_centre():
    box = draw_box(0, MANY[:8], NOW[:8], np.tile([10, 2000], (8, 1)), (0.9, 1.0), (3 / 4, 4 / 3))
    assert (box == [0, (2000 - 13) // 2, 10, 13]).all()


def test_shifts_and_mirrors_are_uniform_and_change_with_the_epoch():
    shifts = draw_shift(0, MANY, NOW, padding=4)
    for axis in (0, 1):
        values, counts = np.unique(shifts[:, axis], return_counts=True)
        assert values.tolist() == list(range(-4, 5)) and np.abs(counts / len(MANY) - 1 / 9).max() < 0.01
    assert abs(draw_mirror(0, MANY, NOW).mean() - 0.5) < 0.02
    assert 0.4 < (draw_mirror(0, MANY, NOW) == draw_mirror(0, MANY, NOW + 1)).mean() < 0.6


def test_the_numbers_of_a_sample_do_not_depend_on_its_batch():
    config, sizes = DataConfig(image_size=64, augment="resized_crop"), np.tile([200, 150], (32, 1))
    whole = plan_geometry(config, True, 7, MANY[:32], NOW[:32], sizes)
    part = plan_geometry(config, True, 7, MANY[5:6], NOW[5:6], sizes[5:6])
    assert (whole.box[5] == part.box[0]).all() and whole.mirror[5] == part.mirror[0]


@pytest.mark.parametrize("shape", [(427, 640), (640, 427), (250, 250), (100, 300)], ids=str)
def test_evaluation_is_resize_256_and_centre_crop_224(shape):
    transforms = pytest.importorskip("torchvision.transforms")
    pixels = np.random.Generator(np.random.Philox(1)).integers(0, 256, (*shape, 3), dtype=np.uint8)
    geometry = plan_geometry(DataConfig(image_size=224), False, 0, MANY[:1], NOW[:1], np.array([shape]))
    bicubic = transforms.InterpolationMode.BICUBIC
    theirs = transforms.CenterCrop(224)(transforms.Resize(256, bicubic)(Image.fromarray(pixels)))
    assert (cut([pixels], geometry, 224, 3)[0].numpy() == np.asarray(theirs).transpose(2, 0, 1)).all()


def test_an_image_of_the_right_size_is_left_alone_in_evaluation():
    pixels = np.random.Generator(np.random.Philox(2)).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    geometry = plan_geometry(DataConfig(image_size=32), False, 0, MANY[:1], NOW[:1], np.array([[32, 32]]))
    assert (cut([pixels], geometry, 32, 3)[0].numpy() == pixels.transpose(2, 0, 1)).all()


@pytest.mark.parametrize("shape", [(64, 3, 32, 32), (5, 1, 7, 7), (1, 3, 1, 1), (0, 3, 8, 8)], ids=str)
def test_shift_and_mirror_is_pad_crop_and_flip(shape, device):
    """Against the plain way, image by image: pad with zeros, cut a window, mirror it."""
    batch, _, height, width = shape
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    shifts = torch.from_numpy(draw_shift(0, np.arange(batch), np.zeros(batch, int), 4))
    mirror = torch.from_numpy(draw_mirror(0, np.arange(batch), np.zeros(batch, int))).long()
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    wanted = torch.empty_like(images)
    for index in range(batch):
        top, left = (shifts[index] + 4).tolist()
        window = padded[index, :, top : top + height, left : left + width]
        wanted[index] = window.flip(-1) if mirror[index] else window
    got = shift_and_mirror(*(tensor.to(device) for tensor in (images, shifts[:, 0], shifts[:, 1], mirror)))
    assert got.dtype == torch.uint8 and torch.equal(got.cpu(), wanted)


def test_grey_and_colour():
    colour = torch.randint(0, 256, (4, 3, 9, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    grey = to_channels(colour, 1)
    for image, wanted in zip(grey, colour, strict=True):
        theirs = Image.fromarray(wanted.permute(1, 2, 0).numpy()).convert("L")
        assert (image[0].numpy() == np.asarray(theirs)).all()
    assert torch.equal(to_channels(grey, 3), grey.expand(-1, 3, -1, -1))
    assert to_channels(colour, 3) is colour


@pytest.mark.parametrize("channels", [1, 3])
def test_crops_of_several_pictures_are_pils_within_one_level(channels):
    """Only a box and its margin are copied, so a weight's last bit can differ from PIL's on the whole picture."""
    rng = np.random.Generator(np.random.Philox(3))
    pictures = [rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((90, 70, 3), (41, 160, 1), (300, 280, 3))]
    sizes = np.array([picture.shape[:2] for picture in pictures])
    for epoch in range(6):
        config, now = DataConfig(image_size=40, augment="resized_crop"), np.full(3, epoch)
        geometry = plan_geometry(config, True, 1, np.arange(3), now, sizes)
        got = cut(pictures, geometry, 40, channels).numpy().astype(int)
        whole = [picture if picture.shape[2] == channels else np.repeat(picture, 3, 2) if channels == 3 else
                 to_grey(picture) for picture in pictures]  # fmt: skip
        plan = np.concatenate([sizes, geometry.box, geometry.size, geometry.anchor, geometry.mirror[:, None]], axis=1)
        for row, picture in enumerate(whole):
            one = torch.from_numpy(np.concatenate([[0], plan[row]]).astype(np.int64))[None]
            wanted = crop_resize_reference(torch.from_numpy(np.ascontiguousarray(picture)).flatten(), one, 40, channels)
            assert np.abs(got[row] - wanted[0].numpy().astype(int)).max() <= 1
