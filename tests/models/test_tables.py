"""What stands in a file or beside it about model and images, in whatever table: obeyed, or refused by its name."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from weight_cases import IMAGE, transformers, vit

from mimir_fast.models.classifier import classifier_of
from mimir_fast.models.facts import facts_of_file, tables
from mimir_fast.models.weight_files import WeightsError, read_weights

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
LISTS: dict[str, Any] = {"mean": [*MEAN], "std": [*STD]}
needs_transformers = pytest.mark.skipif(transformers is None, reason="transformers is not installed")


def logits(path: Path, images: torch.Tensor) -> tuple[torch.Tensor, list[str]]:
    """Of our classifier, and what was assumed."""
    model, report = classifier_of(read_weights(path))
    with torch.no_grad():
        return model(images), report.assumed


@pytest.mark.parametrize("said", [
    {"normalization": LISTS}, {"normalize": {"image_mean": MEAN, "image_std": STD}},
    {"hyper_parameters": {"data": LISTS}}, {"hyper_parameters": {"data": {"normalization": LISTS}}},
    {"datamodule_hyper_parameters": {"pixel_mean": MEAN, "pixel_std": STD}},
    {"config": {"data": {"transforms": [{"name": "Resize"}, {"name": "Normalize", **LISTS}]}}},
    {"hparams": argparse.Namespace(dataset=argparse.Namespace(**LISTS))}, {"args": {"data_config": LISTS}},
    {"normalization": {name: torch.tensor(values) for name, values in LISTS.items()}},
], ids=str)  # fmt: skip
def test_a_normalisation_in_a_table(said: dict[str, Any], tmp_path: Path) -> None:
    """None of them was read: the model was judged on images without one, and the report said "assumed"."""
    model, images = vit(), torch.rand(2, 3, IMAGE, IMAGE)
    torch.save({"state_dict": model.state_dict(), **said}, tmp_path / "a.pth")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    found, assumed = logits(tmp_path / "a.pth", images)
    torch.testing.assert_close(found, model((images - mean) / std).detach(), rtol=1e-4, atol=1e-5)
    assert "normalisation none" not in assumed


def test_a_header_of_safetensors(tmp_path: Path) -> None:
    metadata = {"format": "pt", "normalization": json.dumps(LISTS), "model": '{"num_heads": 2}', "note": "{no JSON"}
    save_file(dict(vit(num_heads=2).state_dict()), tmp_path / "a.safetensors", metadata=metadata)
    facts = read_weights(tmp_path / "a.safetensors").facts
    assert (facts.mean, facts.std, facts.heads) == (MEAN, STD, 2)


def test_one_number_for_all_channels() -> None:
    facts = facts_of_file({"normalization": {"mean": 0.1307, "std": 0.3081}, "mean": 0.93, "std": 0.01})
    assert (facts.mean, facts.std) == ((0.1307,), (0.3081,))
    assert facts_of_file({"mean": 0.93, "std": 0.01, "stats": {"mean": 0.93, "std": 0.01}}).mean is None


def test_what_is_of_something_else_is_no_fact_of_the_encoder() -> None:
    others = {"decoder": {"num_heads": 16}, "teacher": {"num_heads": 6}, "optimizer": LISTS, "loss": LISTS}
    assert not [*facts_of_file(others | {"hyper_parameters": others}).known()]
    assert not [*facts_of_file({"data": [torch.zeros(3), 1, "x", None] * 10**4, "model": "vit", "config": 3}).known()]
    deep: dict[str, Any] = {}
    deep["model"] = deep  # no end
    assert len([*tables(deep)]) < 9


def test_lightnings_hyper_parameters(tmp_path: Path) -> None:
    """`model` and `data` in it: heads, eps, GELU, pooling, the name of timm's model, the size of the images."""
    choices = {"num_heads": 4, "act_layer": "gelu_tanh", "global_pool": "avg", "fc_norm": False}
    model, images = vit(**choices), torch.rand(2, 3, IMAGE, IMAGE)
    hyper = {"lr": 1e-3, "model": choices | {"norm_eps": 1e-6}, "data": LISTS | {"image_size": IMAGE}}
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": hyper, "loops": {}}, tmp_path / "a.ckpt")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    found, assumed = logits(tmp_path / "a.ckpt", images)
    torch.testing.assert_close(found, model((images - mean) / std).detach(), rtol=1e-4, atol=1e-5)
    assert assumed == []


@pytest.mark.parametrize("hyper", [
    {"model_name": "vit_base_patch32_clip_quickgelu_224"},
    {"model": {"name": "vit_base_patch32_clip_quickgelu_224", "num_heads": 2}},
], ids=str)  # fmt: skip
def test_a_name_of_timm_in_a_table(hyper: dict[str, Any], tmp_path: Path) -> None:
    """It says eps and GELU; the tensors are those of its class, or it says nothing."""
    timm = pytest.importorskip("timm")
    more = {"depth": 1, "img_size": 32, "num_classes": 5} | {k: v for k, v in hyper["model"].items() if k != "name"} \
        if "model" in hyper else {"depth": 1, "img_size": 32, "num_classes": 5}  # fmt: skip
    model = timm.create_model("vit_base_patch32_clip_quickgelu_224", **more)
    torch.save({"state_dict": model.state_dict(), "hyper_parameters": hyper}, tmp_path / "a.ckpt")
    facts = read_weights(tmp_path / "a.ckpt").facts
    assert (facts.heads, facts.eps, facts.gelu, facts.pool) == (more.get("num_heads", 12), 1e-5, "quick", "cls")
    torch.save({"state_dict": vit().state_dict(), "hyper_parameters": hyper}, tmp_path / "b.ckpt")
    assert read_weights(tmp_path / "b.ckpt").facts.eps is None


def folder_of(path: Path, processor: Any) -> Any:
    """transformers' ViT, its folder, and a processor written as its package writes it."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=128,
                                    image_size=IMAGE, patch_size=8, num_labels=5)  # fmt: skip
    model = transformers.ViTForImageClassification(config).eval()
    torch.nn.init.normal_(model.classifier.weight, std=0.1)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return model


def agrees(path: Path, model: Any) -> None:
    """With what AutoImageProcessor and the model make of images in [0, 255]."""
    images = torch.randint(0, 256, (2, 3, IMAGE, IMAGE), dtype=torch.uint8)
    pixels = transformers.AutoImageProcessor.from_pretrained(path)(list(images), return_tensors="pt").pixel_values
    with torch.no_grad():
        wanted = model(pixels).logits
    torch.testing.assert_close(logits(path, images / 255)[0], wanted, rtol=1e-4, atol=1e-5)


@needs_transformers
def test_a_processor_inside_of_another_goes_first(tmp_path: Path) -> None:
    """processor_config.json with `image_processor` was not read."""
    sizes = {"size": {"height": IMAGE, "width": IMAGE}}
    model = folder_of(tmp_path, transformers.ViTImageProcessor(image_mean=[*MEAN], image_std=[*STD], **sizes))
    inside = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": inside, "processor_class": "P"}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(inside | {"image_mean": [0.1, 0.1, 0.1]}))
    agrees(tmp_path, model)
    (tmp_path / "preprocessor_config.json").unlink()
    agrees(tmp_path, model)


@needs_transformers
@pytest.mark.parametrize("choices", [
    {"rescale_factor": 1 / 127.5, "rescale_offset": True, "image_mean": [0.1, 0.2, 0.0], "image_std": [*STD]},
    {"rescale_factor": 1 / 127.5, "rescale_offset": True, "do_normalize": False},
    {"do_rescale": False, "rescale_offset": True, "image_mean": [127.5] * 3, "image_std": [127.5] * 3},
], ids=str)  # fmt: skip
def test_pixels_from_minus_one_to_one(choices: dict[str, Any], tmp_path: Path) -> None:
    """`rescale_offset`, after the factor and before the mean, was ignored."""
    sizes = {"size": {"height": IMAGE, "width": IMAGE}, "do_center_crop": False, "include_top": False}
    processor = transformers.EfficientNetImageProcessor(**sizes, **choices)
    agrees(tmp_path, folder_of(tmp_path, processor))


@needs_transformers
@pytest.mark.parametrize("step", ["do_flip_channel_order", "do_grayscale", "do_color_quantize", "include_top"])
def test_steps_that_change_the_colours_are_refused(step: str, tmp_path: Path) -> None:
    folder_of(tmp_path, transformers.ViTImageProcessor())
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {step: True}))
    with pytest.raises(WeightsError, match=f"image processor says {step} True"):
        read_weights(tmp_path)
