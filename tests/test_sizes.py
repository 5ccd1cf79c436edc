"""Images that are not square: sizes as they are typed and saved, data, masks, and weights of other grids."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from file_state import file_state
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from mimir_fast.attacks.unforeseen import warp
from mimir_fast.cli import parse
from mimir_fast.data import DataConfig, build_loader
from mimir_fast.data.crop import cut
from mimir_fast.data.geometry import plan_geometry
from mimir_fast.evaluation.images import Fitting
from mimir_fast.methods.ard_prm import draw_patch_masks
from mimir_fast.methods.classification import Inputs
from mimir_fast.methods.masks import MaskConfig, patches_of_units
from mimir_fast.models.classifier import Classifier, ClassifierConfig, load_classifier
from mimir_fast.models.decoder import Decoder
from mimir_fast.models.families import FAMILIES, Architecture, Family, TimmModel, register
from mimir_fast.models.families.vit import VitEncoder
from mimir_fast.models.loading import initialize, resize_positions
from mimir_fast.models.weight_files import Weights, WeightsError
from mimir_fast.ops.crop_resize import crop_resize
from mimir_fast.sizes import as_size, divided, divides, nearest_grid, size_of

SIZE = (32, 48)


class TestSizes:
    def test_typed_and_saved(self) -> None:
        """A square is one number whatever was typed; a rectangle is two, and JSON has a list of them."""
        for typed, held in ((["32"], 32), (["32", "48"], SIZE), (["48", "48"], 48)):
            config = parse(DataConfig, ["--image_size", *typed])
            assert config.image_size == held
            again = DataConfig(**json.loads(json.dumps({"image_size": asdict(config)["image_size"]})))
            assert again.image_size == held and type(again.image_size) is type(held)

    @pytest.mark.parametrize("wrong", [0, -3, (32,), (32, 0), (32, 48, 3)])
    def test_what_is_no_size(self, wrong: object) -> None:
        with pytest.raises(ValueError, match="image_size must be at least 1 pixel"):
            DataConfig(image_size=wrong)  # type: ignore[arg-type]

    def test_arithmetic(self) -> None:
        assert as_size([7, 7]) == 7 and divided(SIZE, 8) == (4, 6) and divided((32, 48), 16) == (2, 3)
        assert divides(16, SIZE) and not divides(32, SIZE) and not divides(0, SIZE)
        assert nearest_grid(16) == 4 and nearest_grid(24) == (4, 6) and nearest_grid(7) == (1, 7)
        assert size_of(24, 8) == SIZE and size_of(24, 8, (64, 24)) == (64, 24) and size_of(24, 8, (32, 32)) is None


class TestData:
    @pytest.mark.parametrize("channels", [1, 3])
    def test_a_crop_is_the_corner_of_a_larger_one(self, channels: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (60 * 80 * channels,), dtype=torch.uint8, generator=generator).to(device)
        for high, wide in ((21, 50), (50, 21)):
            plan = torch.tensor([[0, 60, 80, 5, 7, 40, 50, 45, 52, -2, 3, mirror] for mirror in (0, 1)])
            square = crop_resize(pixels, plan, side=50, channels=channels)
            wanted = torch.stack([square[0, :, :high, :wide], square[1, :, :high, 50 - wide :]])
            assert torch.equal(crop_resize(pixels, plan, side=(high, wide), channels=channels), wanted)

    @pytest.mark.parametrize("shape", [(40, 90), (100, 60), (33, 50), (31, 47)])
    @pytest.mark.parametrize("augment", [True, False])
    def test_images_are_resized_until_they_just_cover_it(self, shape: tuple[int, int], augment: bool) -> None:
        config = DataConfig(image_size=SIZE, crop_padding=0, flip=False)
        one, sizes = np.zeros(1, np.int64), np.array([shape])
        geometry = plan_geometry(config, augment, 0, one, one, sizes)
        covered = np.array(SIZE) if augment else np.rint(np.array(SIZE) * 256 / 224)
        (size,) = geometry.size
        assert (size >= covered).all() and (size == covered).any()
        assert abs(size[0] * shape[1] - size[1] * shape[0]) <= max(shape)  # the ratio of the image, up to rounding
        picture = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
        resized = Image.fromarray(picture).resize((int(size[1]), int(size[0])), Image.Resampling.BICUBIC)
        (top, left) = geometry.anchor[0].tolist()
        wanted = np.asarray(resized)[top : top + 32, left : left + 48].transpose(2, 0, 1)
        found = cut([picture], geometry, SIZE, 3)[0].numpy()
        assert np.abs(found.astype(int) - wanted).max() <= 1

    def test_evaluation_prepares_images_as_timm_does(self) -> None:
        from timm.data import create_transform

        picture = np.random.default_rng(1).integers(0, 256, (61, 113, 3), np.uint8)
        transform = create_transform((3, *SIZE), crop_pct=0.9, interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1))
        wanted = (transform(Image.fromarray(picture)) * 255).round().to(torch.uint8)
        found = Fitting(0.9)(picture, DataConfig(image_size=SIZE))
        assert torch.equal(torch.from_numpy(found), wanted)

    def test_every_loader(self, tmp_path: Path) -> None:
        """The digits in memory; files through worker processes and through DALI, to the last bit."""
        batch = next(iter(build_loader(DataConfig(image_size=SIZE, limit=8), split="train", batch_size=4)))
        assert batch.images.shape == (4, 3, *SIZE)
        for number in range(4):
            folder = tmp_path / "train" / f"class{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(number).integers(0, 256, (60 + number, 80 - number, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
        found = []
        for loader in ("torch", "dali", "resident"):
            if loader == "dali":
                pytest.importorskip("nvidia.dali")
            augment = "none" if loader == "resident" else "resized_crop"
            config = DataConfig(
                source="folder", root=str(tmp_path), image_size=SIZE, loader=loader, augment=augment, num_workers=0
            )  # fmt: skip
            data = build_loader(config, split="train", batch_size=4)
            found.append(next(iter(data)).images)
            data.close()
            assert found[-1].shape == (4, 3, *SIZE)
        assert torch.equal(found[0], found[1])

    def test_arrays_of_another_size_are_refused(self) -> None:
        with pytest.raises(ValueError, match="image_size 16 48 is smaller"):
            from mimir_fast.data.sources.idx import _pad

            _pad(np.zeros((2, 20, 24), np.uint8), (16, 48))


class TestMasks:
    def test_units_of_several_patches(self) -> None:
        """4 x 6 patches in units of 2 x 2: the last of six units is the lower right one."""
        assert MaskConfig(mask_ratio=0.5, mask_unit=16).units(8, SIZE) == (2, 6, 3)
        assert patches_of_units(torch.tensor([[5]]), 2, (4, 6)).tolist() == [[16, 17, 22, 23]]
        with pytest.raises(ValueError, match=r"tile the image \(32 48\): 8, 16 would do"):
            MaskConfig(mask_unit=24).units(8, SIZE)

    def test_patches_of_the_perturbation(self) -> None:
        samples = torch.arange(5)
        inputs = Inputs(torch.empty(0), samples, samples, samples, seed=0, step=0, branch_scales=None)
        masks = draw_patch_masks(torch.full((5,), 0.5), inputs, (4, 6), num_steps=2)
        assert masks.shape == (2, 5, 1, 4, 6) and ((masks == 0).sum(dim=(2, 3, 4)) == 12).all()

    def test_bending_moves_each_axis_by_its_own_pixels(self) -> None:
        images = torch.rand(1, 1, *SIZE)
        flow = torch.zeros(1, 2, *SIZE)
        flow[:, 0], flow[:, 1] = 5, 3
        torch.testing.assert_close(warp(images, flow)[..., :-3, :-5], images[..., 3:, 5:], rtol=0, atol=1e-4)


def classifier(size: object, family: str = "vit", patch_size: int = 8) -> Classifier:
    torch.manual_seed(0)
    config = ClassifierConfig(family=family, encoder="nano", patch_size=patch_size)
    return Classifier(config, as_size(size), 10).eval()  # type: ignore[arg-type]


def weights_of(model: Classifier, *, says: bool) -> Weights:
    """As our files have them, with or without the configuration."""
    config = {"data": {"image_size": model.image_size}, "model": asdict(model.config)} if says else None
    return Weights(file_state(model), "a.file", config=config)


class TestWeights:
    @pytest.mark.parametrize("size", [(16, 64), (64, 16), (32, 48), (24, 64)])
    def test_the_configuration_says_what_shapes_do_not(self, size: tuple[int, int]) -> None:
        """2 x 8 patches are as many as 4 x 4, and 4 x 6 with a cls token as many rows as 5 x 5 without one."""
        source, images = classifier(size), torch.rand(2, 3, *size)
        loaded = load_classifier(weights_of(source, says=True))
        assert loaded.image_size == size and torch.equal(loaded(images), source(images))
        assert initialize(classifier(size), weights_of(source, says=True)).resized == []

    def test_a_bare_file_is_taken_for_a_square(self) -> None:
        assert load_classifier(weights_of(classifier((16, 64)), says=False)).image_size == 32
        source = classifier((32, 64))
        with pytest.raises(WeightsError, match="HEIGHT WIDTH"):
            load_classifier(weights_of(source, says=False))
        with pytest.raises(WeightsError, match="HEIGHT WIDTH"):
            initialize(classifier(32), weights_of(source, says=False))
        for size in ((32, 64), SIZE):
            bare = weights_of(classifier(size), says=False)
            assert load_classifier(bare, image_size=size).image_size == size
            assert initialize(classifier(size), bare).resized == []

    def test_positions_between_grids(self) -> None:
        def resized(source: Classifier, size: object) -> Tensor:
            model = classifier(size)
            report = initialize(model, weights_of(source, says=True))
            assert [line.split()[0] for line in report.resized] == ["pos_embed"]
            return model.encoder.pos_embed[0]  # type: ignore[index]

        source = classifier(32)
        grid = source.encoder.pos_embed[0, 1:].T.reshape(1, -1, 4, 4)  # type: ignore[index]
        wanted = F.interpolate(grid, size=(2, 8), mode="bicubic").flatten(2)[0].T
        assert torch.equal(resized(source, (16, 64))[1:], wanted)
        assert torch.equal(resized(source, (16, 64))[0], source.encoder.pos_embed[0, 0])  # type: ignore[index]
        turned = resized(classifier((16, 64)), (64, 16))
        assert turned.shape == (17, 96)
        rows = torch.randn(1, 17, 8)
        assert torch.equal(resize_positions(rows, 17, 1, ((2, 8), (2, 8))), rows)

    @pytest.mark.parametrize("says", [True, False])
    def test_other_patches_of_the_same_images(self, says: bool) -> None:
        report = initialize(classifier(SIZE, patch_size=4), weights_of(classifier(SIZE), says=says))
        assert [line.split()[0] for line in report.resized] == ["patch_embed.proj.weight", "pos_embed"]

    def test_windows_of_a_square_in_a_rectangle(self) -> None:
        model = classifier((16, 32), "swin", 2)
        report = initialize(model, weights_of(classifier(32, "swin", 2), says=True))
        assert len(report.resized) == 6 and model.encoder.stages[0].blocks[0].attn.window == (2, 4)  # type: ignore[index,union-attr]
        loaded = load_classifier(weights_of(model, says=True))
        images = torch.rand(2, 3, 16, 32)
        assert loaded.image_size == (16, 32) and torch.equal(loaded(images), model.eval()(images))
        turned = classifier((32, 16), "swin", 2)
        assert len(initialize(turned, weights_of(model, says=True)).resized) == 6

    def test_files_of_ours_say_it(self, tmp_path: Path) -> None:
        source = classifier(SIZE)
        saved = {"format": "mimir_fast", "config": json.dumps({"data": {"image_size": SIZE}})}
        save_file(file_state(source), tmp_path / "a.safetensors", metadata=saved)
        assert load_classifier(tmp_path / "a.safetensors").image_size == SIZE

    def test_families_from_outside(self) -> None:
        """Those that know of squares only are asked as before, and take the size that was saved."""

        def build(architecture: Architecture, final_norm: bool) -> VitEncoder:
            encoder = VitEncoder(48, 1, 3, image_size=architecture.image_size, patch_size=8, final_norm=final_norm)
            encoder.register_parameter("mine", nn.Parameter(torch.zeros(1)))
            return encoder

        with FAMILIES.restored():
            register(
                Family(
                    name="mine", title="Mine", sizes={"mini": "small"}, anchor="mine", mask_unit=lambda a: 8,
                    build=build, build_decoder=Decoder, recognise=lambda tensors: Architecture("mine", "mini", 32, 8),
                    to_timm=lambda tensors, a: TimmModel("", {}, {}),
                )
            )  # fmt: skip
            source = Classifier(ClassifierConfig("mine", "mini", 8), SIZE, 10).eval()
            loaded, images = load_classifier(weights_of(source, says=True)), torch.rand(2, 3, *SIZE)
            assert loaded.image_size == SIZE and torch.equal(loaded(images), source(images))
