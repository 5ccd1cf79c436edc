"""Folders for transformers: its Auto classes read them, and compute from raw images what we compute."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_exports import CASES, classifier, original_of, run_of
from torch import nn

from mimir_fast.export import ExportConfig, export
from mimir_fast.exporting.hugging_face import find_twin
from mimir_fast.models.classifier import load_classifier
from mimir_fast.models.masked_model import View
from mimir_fast.ops.patches import gather_patches, patchify

transformers = pytest.importorskip("transformers")


def folder_of(model: nn.Module, tmp_path: Path) -> Path:
    return export(ExportConfig(str(run_of(model, tmp_path / "run")), str(tmp_path / "folder"), format="hf"))


@pytest.mark.parametrize(
    ("family", "pool", "class_name"),
    [
        ("vit", "cls", "ViTForImageClassification"),
        ("vit", "avg", "BeitForImageClassification"),
        ("swin", "avg", "SwinForImageClassification"),
        ("convnext", "avg", "ConvNextForImageClassification"),
    ],
)
def test_classifiers(family: str, pool: Any, class_name: str, tmp_path: Path) -> None:
    """From uint8 pixels on, with nothing but the folder: the normalisation is in it."""
    model = classifier(family, global_pool=pool)
    folder = folder_of(model, tmp_path)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    theirs = transformers.AutoModelForImageClassification.from_pretrained(folder)
    assert type(theirs).__name__ == class_name and theirs.config.num_labels == 7
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    images = (CASES[family].images(3) * 255).to(torch.uint8)
    pixels = processor([image.permute(1, 2, 0).numpy() for image in images], return_tensors="pt").pixel_values
    with torch.no_grad():
        torch.testing.assert_close(theirs(pixels).logits, model(images), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(load_classifier(folder)(images), model(images), rtol=1e-4, atol=1e-5)


def test_a_masked_autoencoder_keeps_its_decoder(tmp_path: Path) -> None:
    model = CASES["vit"].masked_model().eval()
    folder = folder_of(model, tmp_path)
    theirs = transformers.ViTMAEForPreTraining.from_pretrained(folder)
    assert theirs.config.norm_pix_loss and theirs.config.mask_ratio == 0.75
    images, noise = CASES["vit"].images(3), torch.rand(3, 16)
    keep = noise.argsort(dim=1)[:, :4]
    with torch.no_grad():
        ours = model(View(gather_patches(patchify(images, 8), keep), keep)).prediction
        torch.testing.assert_close(theirs(images, noise=noise).logits, ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "class_name"), [("vit", "ViTModel"), ("swin", "SwinModel")])
def test_an_encoder_without_its_decoder(family: str, class_name: str, tmp_path: Path) -> None:
    model, images = CASES[family].masked_model("linear").eval(), CASES[family].images(3)
    folder = folder_of(model, tmp_path)
    theirs = transformers.AutoModel.from_pretrained(folder)
    assert type(theirs).__name__ == class_name
    with torch.no_grad():
        tokens = original_of(model).model(images)
        torch.testing.assert_close(theirs(images).last_hidden_state, tokens, rtol=1e-4, atol=1e-5)


def test_grey_images(tmp_path: Path) -> None:
    from family_checks import Case

    model = Case("vit", "nano", 16, 4, channels=1).classifier(global_pool="cls", normalization="half")
    folder = folder_of(model, tmp_path)
    assert json.loads((folder / "preprocessor_config.json").read_text())["image_mean"] == [0.5]


def test_what_transformers_lacks_is_said() -> None:
    for family in ("cait", "convit", "xcit", "convstem"):
        with pytest.raises(
            ValueError, match=r"transformers has no .*of our families\. --format onnx, pt2 and torchscr"
        ):
            find_twin(original_of(CASES[family].masked_model()))
    with pytest.raises(ValueError, match="ConvNextModel their mean only"):
        find_twin(original_of(CASES["convnext"].masked_model()))
    other = original_of(classifier("vit", global_pool="cls"))
    assert other.model is not None
    other.tensors["blocks.0.ls1.gamma"] = torch.ones(96)
    with pytest.raises(ValueError, match=r"ViTForImageClassification has no place for blocks\.0\.ls1\.gamma"):
        find_twin(other)


def test_norms_of_two_kinds_are_not_one() -> None:
    """ViT's configuration has one eps for all."""
    other = original_of(classifier("vit", global_pool="cls"))
    other.model.encoder.blocks[0].norm1.eps = 1e-5  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="norms have eps 1e-06, 1e-05: transformers has one"):
        find_twin(other)


def test_a_folder_of_others_is_not_replaced(tmp_path: Path) -> None:
    model = classifier("vit", global_pool="cls")
    folder = folder_of(model, tmp_path)
    again = ExportConfig(str(tmp_path / "run"), str(folder), format="hf", overwrite=True)
    assert export(again) == folder
    (folder / "notes.txt").touch()
    with pytest.raises(FileExistsError, match=r"holds notes\.txt too"):
        export(again)
