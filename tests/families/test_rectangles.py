"""Images that are not square, in every family and from the command line to the report."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from family_checks import (
    Case,
    check_all_visible_equals_whole,
    check_equals_timm,
    check_nothing_leaks,
    check_recognised,
    some_places,
    view_of,
)
from PIL import Image

from mimir_fast import evaluate, finetune, pretrain
from mimir_fast.checkpoints.reading import checkpoints_of, step_of
from mimir_fast.evaluation.adapters import load_model
from mimir_fast.export import ExportConfig, export
from mimir_fast.models.classifier import load_classifier
from mimir_fast.models.families import all_families
from mimir_fast.models.masked_loading import load_masked_model
from mimir_fast.models.masked_model import ModelConfig, build_masked_model
from mimir_fast.ops.patches import patchify

SIZE = (32, 48)
CASES = {
    family: Case(family, "nano", SIZE, {"swin": 2, "convnext": 2}.get(family, 8)) for family in sorted(all_families())
}
every_family = pytest.mark.parametrize("family", CASES)
# timm's have the cls token pooled, or a norm behind the mean.
POOLS = {"cait": {"global_pool": "cls"}, "xcit": {"global_pool": "cls"}}


@pytest.mark.parametrize("family", [family for family in CASES if family != "convit"])
def test_equals_timm(family: str) -> None:
    check_equals_timm(CASES[family], **POOLS.get(family, {}))


@every_family
def test_masks_and_places(family: str) -> None:
    check_all_visible_equals_whole(CASES[family])
    check_nothing_leaks(CASES[family])
    check_recognised(CASES[family])


@pytest.mark.parametrize("family", ["convit", "xcit"])
def test_the_authors_pseudo_grid_is_for_squares(family: str) -> None:
    model = build_masked_model(ModelConfig(family, "nano", 8, positions="official"), SIZE)
    view = view_of(model, CASES[family].images(), some_places(model.encoder, keep=4))
    with pytest.raises(ValueError, match="4 x 6 patches are no squares"):
        model(view)


@pytest.mark.parametrize("family", ["vit", "convit", "cait", "convstem", "convnext"])
def test_is_the_upper_part_of_a_square(family: str) -> None:
    """32 x 48 pixels are what a model of 48 x 48 makes of them where the lowest rows are masked."""
    case = CASES[family]
    encoder, square = case.encoder(), replace(case, image_size=48).encoder()
    tensors = square.state_dict()
    if "pos_embed" in tensors:
        tensors["pos_embed"] = tensors["pos_embed"][:, : encoder.state_dict()["pos_embed"].shape[1]]
    encoder.load_state_dict(tensors)
    patches = patchify(case.images(), encoder.mask_unit)
    places = torch.arange(encoder.num_patches).expand(2, -1)
    with torch.no_grad():
        ours, theirs = encoder(patches, None), square(patches, places)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


DIGITS = (
    "--data.source", "digits", "--data.image_size", "32", "48", "--data.limit", "16", "--data.num_workers", "0",
    "--device", "cpu", "--batch_size", "8", "--model.family", "vit", "--model.encoder", "nano",
    "--model.patch_size", "8",
)  # fmt: skip


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps that was broken off after the first."""
    line = [*DIGITS, "--max_steps", "2", "--save_every", "1", "--output_dir", str(tmp_path_factory.mktemp("run"))]
    pretrain.pretrain(pretrain.config_from([*line, "--stop_after", "1"]))
    return pretrain.pretrain(pretrain.config_from(line))


def test_a_run_that_was_gone_on_with(pretrained: Path) -> None:
    saved = json.loads((pretrained / "config.json").read_text())
    assert saved["data"]["image_size"] == [32, 48]
    assert [step_of(path) for path in checkpoints_of(pretrained)] == [1, 2]
    model, _ = load_masked_model(pretrained)
    assert model.encoder.grid == (4, 6) and model.encoder.image_size == SIZE
    with Image.open(next(pretrained.rglob("*reconstruction*.png"))) as picture:  # rows of tiles, 96 wide and 64 high
        width, height = picture.size
    assert width > 8 * 96 and (height - 4) % (64 + 4) == 0


def test_fine_tuned_and_evaluated(pretrained: Path, tmp_path: Path) -> None:
    line = [*DIGITS, "--max_steps", "2", "--output_dir", str(tmp_path / "tuned"), "--init", str(pretrained)]
    tuned = finetune.finetune(finetune.config_from(line))
    args = ["--checkpoint", str(tuned), "--suite", "table", "--limit", "2", "--output_dir", str(tmp_path / "out")]
    args += ["--autoattack", "no", "--unforeseen", "yes", "--pretrained", str(pretrained)]
    assert {"accuracy", "unforeseen", "reconstruction"} <= evaluate.evaluate(evaluate.config_from(args)).sections.keys()
    images, model = torch.rand(2, 3, *SIZE), load_classifier(tuned)
    path = tmp_path / "model.safetensors"
    for form in ("timm", "safetensors"):
        export(ExportConfig(str(tuned), str(path), form, overwrite=True))
        judged = load_model(str(path), num_classes=10, device=torch.device("cpu"), image_size=SIZE).module
        with torch.no_grad():
            torch.testing.assert_close(judged(images), model(images), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="cut squares"):
        export(ExportConfig(str(tuned), str(tmp_path / "hf"), "hf"))
