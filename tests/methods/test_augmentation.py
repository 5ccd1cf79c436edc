"""RandAugment's operations against timm's on PIL images, and the batch logic."""

from typing import Any

import numpy as np
import pytest
import torch

from mimir_fast.methods.augmentation import OPERATIONS, RandAugmentConfig, rand_augment
from mimir_fast.recipes.finetuning import RANDAUGMENT

RECIPE = RandAugmentConfig(num_ops=2, magnitude=9)
GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")


def photo_like(count: int, size: int = 32) -> torch.Tensor:
    """Smooth colour images, so that resampling differences stay small."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 5, 5, generator=generator) * 255
    fine = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True)
    return fine.clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("level", [0.25, 0.9])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("name", list(OPERATIONS))
def test_operation_equals_timm(name: str, sign: float, level: float, monkeypatch: pytest.MonkeyPatch) -> None:
    auto_augment: Any = pytest.importorskip("timm.data.auto_augment")
    from PIL import Image

    monkeypatch.setattr(auto_augment, "_randomly_negate", lambda value: sign * value)
    images = photo_like(3)
    ours = OPERATIONS[name](images, torch.full((3,), level), torch.full((3,), sign), RECIPE)
    to_arguments = auto_augment.LEVEL_TO_ARG[name]
    arguments = to_arguments(10 * level, {}) if to_arguments is not None else ()
    options = {"fillcolor": (128, 128, 128), "resample": Image.Resampling.BILINEAR} if name in GEOMETRIC else {}
    for image, result in zip(images, ours, strict=True):
        pil = Image.fromarray(image.permute(1, 2, 0).numpy())
        wanted = np.asarray(auto_augment.NAME_TO_OP[name](pil, *arguments, **options)).astype(int)
        difference = np.abs(result.permute(1, 2, 0).numpy().astype(int) - wanted)
        if name in GEOMETRIC:  # PIL mixes the border with its fill colour in its own way
            assert (difference <= 3).mean() > 0.9
        else:
            assert difference.max() <= 1


@pytest.mark.parametrize("level", [0.0, 0.25, 0.9])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("name", GEOMETRIC)
def test_authors_fill_and_interpolation(name: str, sign: float, level: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As timm's `create_transform` sets them up for a mean of 0, on noise and on an image that is no square."""
    auto_augment: Any = pytest.importorskip("timm.data.auto_augment")
    from PIL import Image
    from timm.data import create_transform

    transform = create_transform(
        (3, 32, 28), is_training=True, auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic",
        mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0),
    )  # fmt: skip
    operations = next(part for part in transform.transforms if isinstance(part, auto_augment.RandAugment)).ops
    theirs = next(op for op in operations if op.name == name)
    theirs.prob, theirs.magnitude, theirs.magnitude_std = 1.0, 10 * level, 0
    monkeypatch.setattr(auto_augment, "_randomly_negate", lambda value: sign * value)
    images = torch.randint(0, 256, (3, 3, 32, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ours = OPERATIONS[name](images, torch.full((3,), level), torch.full((3,), sign), RANDAUGMENT)
    for image, result in zip(images, ours, strict=True):
        wanted = np.asarray(theirs(Image.fromarray(image.permute(1, 2, 0).numpy()))).astype(int)
        difference = np.abs(result.permute(1, 2, 0).numpy().astype(int) - wanted)
        assert difference.max() <= 1 and (difference > 0).mean() < 0.01


def test_strength_belongs_to_the_image() -> None:
    images = photo_like(1).expand(3, -1, -1, -1).contiguous()
    levels = torch.tensor([0.0, 0.5, 0.9])
    together = OPERATIONS["BrightnessIncreasing"](images, levels, torch.ones(3), RECIPE)
    for i in range(3):
        alone = OPERATIONS["BrightnessIncreasing"](images[i : i + 1], levels[i : i + 1], torch.ones(1), RECIPE)
        assert torch.equal(together[i], alone[0])
    assert torch.equal(together[0], images[0])


def test_does_not_depend_on_the_batch() -> None:
    images, samples, epochs = photo_like(24), torch.arange(50, 74), torch.full((24,), 3)
    whole = rand_augment(RECIPE, images, samples, epochs, seed=7)
    part = rand_augment(RECIPE, images[10:15], samples[10:15], epochs[10:15], seed=7)
    assert torch.equal(whole[10:15], part)
    assert not torch.equal(whole, rand_augment(RECIPE, images, samples, epochs + 1, seed=7))


def test_half_of_the_operations_are_applied() -> None:
    """One operation with probability one half; a few, such as a posterised black image, change nothing."""
    images = photo_like(1).expand(600, -1, -1, -1).contiguous()
    one = RandAugmentConfig(num_ops=1, magnitude=9)
    out = rand_augment(one, images, torch.arange(600), torch.zeros(600, dtype=torch.long), seed=0)
    changed = (out != images).flatten(1).any(dim=1).float().mean()
    assert abs(changed - 0.5) < 0.07
    assert torch.equal(images[0], photo_like(1)[0])  # the input is not written to


def test_strength_warms_up() -> None:
    images = photo_like(1).expand(400, -1, -1, -1).contiguous()
    config = RandAugmentConfig(num_ops=2, magnitude=9, warmup_epochs=10)

    def change(epoch: int) -> float:
        epochs = torch.full((400,), epoch)
        out = rand_augment(config, images, torch.arange(400), epochs, seed=0)
        return float((out.float() - images.float()).abs().mean())

    assert change(0) < 0.8 * change(10)
    torch.testing.assert_close(change(10), change(50), rtol=0.25, atol=0)


@pytest.mark.parametrize("options", [{"num_ops": -1}, {"magnitude": 31}, {"warmup_epochs": -1}, {"fill": (256,)}])
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="wanted"):
        RandAugmentConfig(**options)  # type: ignore[arg-type]


def test_floats_are_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        rand_augment(RECIPE, torch.rand(2, 3, 8, 8), torch.arange(2), torch.zeros(2), seed=0)
