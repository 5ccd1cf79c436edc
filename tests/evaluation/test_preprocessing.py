"""A model's own preprocessing is followed to the pixel: timm's for every pretrained tag, RobustBench's by its names."""

from collections import defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mimir_fast.data import DataConfig
from mimir_fast.evaluation.images import Fitting, fitting_for
from mimir_fast.evaluation.robustbench_zoo import PREPROCESSING, package_folder
from mimir_fast.evaluation.timm_files import made_for_timm
from mimir_fast.sizes import height_width

PIXELS = np.random.default_rng(0).integers(0, 256, (640, 640, 3), dtype=np.uint8)


def prepared(made_for: dict[str, Any], height: int, width: int, channels: int = 3) -> np.ndarray:
    config = DataConfig(source="folder", image_size=made_for["image_size"], channels=channels)
    return fitting_for(made_for, made_for["image_size"])(PIXELS[:height, :width], config)


def test_every_pretrained_tag_of_timm() -> None:
    """Grouped by all that timm's own transform is made from: some hundred of the 1,800 tags differ."""
    timm = pytest.importorskip("timm")
    from timm.data import create_transform, resolve_data_config

    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for tag in timm.list_pretrained():
        settings = timm.get_pretrained_cfg(tag).to_dict()
        asked = resolve_data_config(pretrained_cfg=settings)
        mean = asked["mean"] if asked["crop_mode"] == "border" else (0.5, 0.5, 0.5)  # else it moves no pixel
        key = (asked["input_size"], asked["crop_pct"], asked["crop_mode"], asked["interpolation"], tuple(mean))
        groups[key].append(made_for_timm(settings))
    assert {key[2] for key in groups} == {"center", "squash", "border"} and len(groups) > 50
    for (input_size, crop_pct, crop_mode, interpolation, mean), made in groups.items():
        assert all(other == made[0] for other in made), "one preparation in timm, several here"
        transform = create_transform(
            input_size, crop_pct=crop_pct, crop_mode=crop_mode, interpolation=interpolation, mean=mean,
            use_prefetcher=True,
        )  # fmt: skip
        side = max(input_size)
        for height, width in ((60, 113), *[(97, 64)] * (side <= 400), *[(side, side)] * (side <= 256)):
            wanted = np.asarray(transform(Image.fromarray(PIXELS[:height, :width])))
            found = prepared(made[0], height, width)
            assert np.array_equal(found, wanted), (input_size, crop_pct, crop_mode, interpolation, (height, width))


@pytest.mark.parametrize("size", [152, 188, 256, 299, 320])
def test_the_short_side_is_cut_where_timm_cuts_it(size: int) -> None:
    """8/7 of these is no integer, and rounds up."""
    create_transform = pytest.importorskip("timm.data").create_transform
    made = made_for_timm({"input_size": (3, size, size), "crop_pct": 0.875, "interpolation": "bicubic"})
    transform = create_transform(size, crop_pct=0.875, interpolation="bicubic", use_prefetcher=True)
    wanted = np.asarray(transform(Image.fromarray(PIXELS[:375, :500])))
    assert np.array_equal(prepared(made, 375, 500), wanted)
    usual = Fitting()(PIXELS[:375, :500], DataConfig(source="folder", image_size=size))
    assert not np.array_equal(usual, wanted), "as the loaders have it, another short side"


def test_squashed_and_bordered_pictures_are_whole() -> None:
    """What was lost: a centre crop of 500 × 375 cuts a quarter of the width off."""
    made = {"image_size": 64, "crop": 1.0, "interpolation": "bilinear", "mode": "border", "fill": (124, 116, 104)}
    found = prepared(made, 100, 200)
    assert (found[:, :16] == np.array([[[124]], [[116]], [[104]]])).all() and (found[:, 48:] == found[:, :16]).all()
    grey = prepared(made, 100, 200, channels=1)
    assert grey.shape == (1, 64, 64) and (grey[:, :16] == 117).all(), "the colour, weighed as pixels are"
    squashed = prepared({**made, "mode": "squash", "fill": (0,)}, 100, 200)
    wanted = np.asarray(Image.fromarray(PIXELS[:100, :200]).resize((64, 64), Image.Resampling.BILINEAR))
    assert np.array_equal(squashed, wanted.transpose(2, 0, 1))


@pytest.mark.parametrize("name", [name for name in PREPROCESSING if name])
@pytest.mark.parametrize("shape", [(300, 400), (290, 256)])
def test_robustbenchs_preparations(name: str, shape: tuple[int, int]) -> None:
    """Against what robustbench.data.PREPROCESSINGS is made of."""
    T = pytest.importorskip("torchvision.transforms")
    wanted = {
        "Res256Crop224": [T.Resize(256), T.CenterCrop(224)],
        "BicubicRes256Crop224": [T.Resize(256, interpolation=T.InterpolationMode("bicubic")), T.CenterCrop(224)],
        "Res224": [T.Resize([224, 224])],
        "Crop288": [T.CenterCrop(288)],
    }[name]
    pixels = np.asarray(T.Compose(wanted)(Image.fromarray(PIXELS[: shape[0], : shape[1]]))).transpose(2, 0, 1)
    assert np.array_equal(prepared(PREPROCESSING[name], *shape), pixels)


def test_the_table_is_robustbenchs_own() -> None:
    if package_folder() is None:
        pytest.skip("RobustBench's own package pins old ones: it is installed aside")
    from robustbench.data import PREPROCESSINGS

    assert set(PREPROCESSING) == set(PREPROCESSINGS)


def test_who_asks_is_followed_and_small_images_stay_themselves() -> None:
    made = made_for_timm(
        {"input_size": (3, 64, 64), "crop_pct": 0.9, "interpolation": "bicubic", "crop_mode": "squash"}
    )
    asked = fitting_for(made, 64, crop=0.5, interpolation="nearest")
    assert (asked.crop, asked.interpolation, asked.mode, asked.native) == (0.5, "nearest", "squash", False)
    assert fitting_for(made, 32).native, "evaluated at another size than it was made for"
    assert fitting_for({}, 32) == Fitting() and fitting_for({}, 32, crop=0.9) == Fitting(0.9)
    config = DataConfig(source="folder", image_size=32)
    small = PIXELS[:32, :32]
    for fitting in (Fitting(), fitting_for(made, 32)):
        assert np.array_equal(fitting(small, config), small.transpose(2, 0, 1))
    assert not np.array_equal(replace(fitting, native=False)(small, config), small.transpose(2, 0, 1))
    assert Fitting().as_dict() == {"crop": 0.875, "interpolation": "bicubic"}, "as evaluations that go on recorded it"


def test_sizes_that_are_no_squares() -> None:
    """timm's ResizeKeepRatio rounds both sides; its border pads the other axis."""
    create_transform = pytest.importorskip("timm.data").create_transform
    for mode in ("center", "squash", "border"):
        made = made_for_timm({"input_size": (3, 48, 80), "crop_pct": 0.9, "crop_mode": mode, "mean": (0.1, 0.2, 0.3)})
        assert height_width(made["image_size"]) == (48, 80)
        transform = create_transform(
            (3, 48, 80),
            crop_pct=0.9,
            crop_mode=mode,
            interpolation="bicubic",
            mean=(0.1, 0.2, 0.3),
            use_prefetcher=True,
        )
        for height, width in ((61, 113), (200, 90)):
            wanted = np.asarray(transform(Image.fromarray(PIXELS[:height, :width])))
            assert np.array_equal(prepared(made, height, width), wanted), mode
