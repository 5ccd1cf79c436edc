"""Normalisation is numbers inside the model: any numbers, written by every save and read back by every load."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from file_state import file_state
from safetensors import safe_open
from safetensors.torch import save_file
from small_families import IMAGE, PATCH, draw, make, moved, view

from mimir_fast.attacks.reconstruction import attack_visible
from mimir_fast.attacks.threat_model import LinfThreat
from mimir_fast.checkpoints.saving import save_checkpoint
from mimir_fast.evaluation.adapters import load_model
from mimir_fast.export import ExportConfig, export
from mimir_fast.hub import HubClassifier
from mimir_fast.models.classifier import Classifier, ClassifierConfig, build_classifier, load_classifier
from mimir_fast.models.families import all_families
from mimir_fast.models.loading import initialize
from mimir_fast.models.masked_loading import load_masked_model
from mimir_fast.models.masked_model import ModelConfig, View, build_masked_model
from mimir_fast.models.normalization import Normalizer
from mimir_fast.models.weight_files import WeightsError, read_weights
from mimir_fast.ops.patches import gather_patches, patchify

CIFAR = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)  # the authors': no named choice
CPU = torch.device("cpu")
ALL = sorted(all_families())


def by_hand(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in CIFAR)
    return (images - mean) / std


def classifier(**options: Any) -> Classifier:
    torch.manual_seed(0)
    config = ClassifierConfig(encoder="nano", patch_size=8, **options)
    model = moved(build_classifier(config, 32, 10)).eval()
    assert isinstance(model, Classifier)
    return model


def run_of(folder: Path, model: torch.nn.Module, config: Any) -> Path:
    tensors = {f"model/{n}": t.detach() for n, t in file_state(model).items()}
    meta = {"step": 1, "config": json.loads(json.dumps({"model": asdict(config), "data": {"image_size": IMAGE}}))}
    save_checkpoint(folder / "checkpoints" / "step-00000001", tensors, meta)
    return folder


@pytest.mark.parametrize("family", ALL)
def test_a_masked_model_embeds_normalised_patches(family: str) -> None:
    plain, normalised = make(family), make(family, mean=CIFAR[0], std=CIFAR[1])
    assert file_state(plain).keys() == file_state(normalised).keys()
    images = draw()[0]
    keep = torch.rand(len(images), plain.num_patches).argsort(dim=1)[:, : plain.num_patches // 2]

    def seen(pixels: torch.Tensor) -> View:
        return View(gather_patches(patchify(pixels, plain.patch_size), keep), keep)

    torch.testing.assert_close(normalised(seen(images)).prediction, plain(seen(by_hand(images))).prediction)


def test_without_normalisation_nothing_is_computed() -> None:
    images, normalizer = torch.rand(2, 3, 8, 8), Normalizer(((0.0,) * 3, (1.0,) * 3))
    patches = patchify(images, 4)
    assert normalizer(images) is images and normalizer(patches) is patches


def test_the_attack_stays_in_the_ball_of_pixels() -> None:
    model, (images, keep, masked) = make("vit", normalization="imagenet"), draw()
    clean = view().patches
    threat = LinfThreat(8 / 255, 4 / 255, 3)
    found = attack_visible(model, images, clean, clean, keep, masked, True, threat)
    change = (found - clean).abs()
    assert change.max() <= 8 / 255 + 1e-6 and change.mean() > 4 / 255
    assert found.min() >= 0 and found.max() <= 1


@pytest.mark.parametrize("kind", [ClassifierConfig, ModelConfig])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mean": (0.5,)}, "together"),
        ({"mean": (0.5, 0.5), "std": (0.5,)}, "2 and 1 numbers"),
        ({"mean": (125.0, 123.0, 114.0), "std": (63.0, 62.0, 67.0)}, "125/255"),
        ({"mean": (0.5,) * 3, "std": (0.5, 0.0, 0.5)}, "above 0"),
        ({"normalization": "imagnet"}, "wanted one of none"),
    ],
)
def test_bad_numbers_name_the_fix(kind: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        kind(encoder="nano", **options)


def test_numbers_must_be_one_a_channel() -> None:
    grey = ClassifierConfig(encoder="nano", patch_size=8, mean=(0.5,), std=(0.5,))
    assert build_classifier(grey, 16, 10, channels=1).normalizer.statistics == ((0.5,), (0.5,))
    with pytest.raises(ValueError, match="wanted 3"):
        build_classifier(grey, 16, 10)
    with pytest.raises(ValueError, match="one number a channel"):
        build_classifier(ClassifierConfig(encoder="nano", normalization="half", patch_size=8), 16, 10, channels=4)


@pytest.mark.parametrize("way", ["run", "safetensors", "hub", "timm"])
def test_any_numbers_come_back_from_every_file(tmp_path: Path, way: str) -> None:
    model = classifier(mean=CIFAR[0], std=CIFAR[1])
    source = run_of(tmp_path / "run", model, model.config)
    if way in ("safetensors", "timm"):
        source = export(ExportConfig(str(source), str(tmp_path / "out.safetensors"), format=way))  # type: ignore[arg-type]
    if way == "hub":
        hub = HubClassifier.from_run(source)
        hub.run_config = {}  # the numbers do not hang on the configuration
        hub.save_pretrained(tmp_path / "hub")
        source = tmp_path / "hub" / "model.safetensors"
    loaded, images = load_classifier(source), torch.rand(2, 3, 32, 32)
    assert (loaded.config.mean, loaded.config.std) == CIFAR
    torch.testing.assert_close(loaded(images), model(images))
    judged = load_model(str(source), num_classes=10, device=CPU, image_size=32)
    assert "0.4914" in judged.preprocessing and not judged.notes


def test_a_masked_run_comes_back(tmp_path: Path) -> None:
    config = ModelConfig(encoder="nano", patch_size=PATCH, mean=CIFAR[0], std=CIFAR[1])
    model = moved(build_masked_model(config, IMAGE)).eval()
    loaded, _ = load_masked_model(run_of(tmp_path, model, config))
    assert loaded.normalizer.statistics == CIFAR
    torch.testing.assert_close(loaded(view()).prediction, model(view()).prediction)
    other, _ = load_masked_model(tmp_path, statistics=((0.5,) * 3, (0.5,) * 3))
    assert other.normalizer.statistics == ((0.5,) * 3, (0.5,) * 3)


def test_flags_override_and_silence_is_said(tmp_path: Path) -> None:
    model, images = classifier(), torch.rand(2, 3, 32, 32)
    torch.save({"model": file_state(model)}, tmp_path / "bare.pth")
    options: dict[str, Any] = {"num_classes": 10, "device": CPU, "image_size": 32}
    silent = load_model(str(tmp_path / "bare.pth"), **options)
    assert silent.notes == ["assumed: normalisation none (--mean and --std say otherwise)"]
    asked = load_model(str(tmp_path / "bare.pth"), **options, mean=CIFAR[0], std=CIFAR[1])
    torch.testing.assert_close(asked.module(images), model(by_hand(images)))
    assert not asked.notes and "as asked" in asked.preprocessing
    run = run_of(tmp_path / "run", classifier(normalization="half"), ClassifierConfig(normalization="half"))
    over = load_model(str(run), **options, mean=CIFAR[0], std=CIFAR[1])
    torch.testing.assert_close(over.module(images), model(by_hand(images)))
    assert len(over.notes) == 1 and "in place of normalization half" in over.notes[0]
    with pytest.raises(WeightsError, match="channels"):
        load_model(str(run), **options, mean=(0.5,), std=(0.5,))


def test_an_export_says_what_is_known_and_no_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": file_state(classifier())}, tmp_path / "bare.pth")
    silent = export(ExportConfig(str(tmp_path / "bare.pth"), str(tmp_path / "a.safetensors"), format="safetensors"))
    assert "assumed: normalisation none" in capsys.readouterr().out
    assert read_weights(silent).normalization is None
    told = export(ExportConfig(str(silent), str(tmp_path / "b.safetensors"), mean=CIFAR[0], std=CIFAR[1]))
    assert read_weights(told).normalization == CIFAR


def test_weights_of_timm_keep_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    create = timm.create_model

    def untrained(name: str, pretrained: bool = False, **options: Any) -> Any:  # the weights cannot be downloaded here
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", untrained)
    path = export(ExportConfig("timm:vit_tiny_patch16_224", str(tmp_path / "a.safetensors")))
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["mean"]) == [0.5, 0.5, 0.5]
    assert read_weights(path).normalization == ((0.5,) * 3, (0.5,) * 3)


def test_initialize_tells_of_other_statistics(tmp_path: Path) -> None:
    source = classifier(mean=CIFAR[0], std=CIFAR[1])
    run = run_of(tmp_path, source, source.config)
    report = str(initialize(classifier(), run))
    assert "--model.mean 0.4914 0.4822 0.4465 --model.std 0.247 0.2435 0.2616" in report
    assert "trained with" not in str(initialize(classifier(mean=CIFAR[0], std=CIFAR[1]), run))


@pytest.mark.parametrize("family", ALL)
def test_a_single_stage_run_is_a_classifier(tmp_path: Path, family: str) -> None:
    """The same logits as the masked model's own head gives when nothing is masked."""
    config = ModelConfig(family=family, encoder="nano", patch_size=PATCH, normalization="half")
    torch.manual_seed(0)
    model = moved(build_masked_model(config, IMAGE, num_classes=10)).eval()
    images = draw()[0]
    whole = torch.arange(model.num_patches).expand(len(images), -1)
    wanted = model(View(patchify(images, model.patch_size), whole, whole[:, :1])).logits
    loaded = load_classifier(run_of(tmp_path, model, config), num_classes=10)
    torch.testing.assert_close(loaded(images), wanted, rtol=1e-4, atol=1e-5)


def test_a_head_of_another_pooling_starts_fresh(tmp_path: Path) -> None:
    config = ModelConfig(encoder="nano", patch_size=8)
    source = moved(build_masked_model(config, 32, num_classes=10))
    run = run_of(tmp_path, source, config)
    mean_pooled, before = classifier(), classifier().head.weight
    report = initialize(mean_pooled, run)
    assert torch.equal(mean_pooled.head.weight, before) and "another pooling" in str(report)
    cls_pooled = classifier(global_pool="cls")
    initialize(cls_pooled, run)
    assert torch.equal(cls_pooled.head.weight, source.head.weight)


def test_metadata_of_the_wrong_length_is_refused(tmp_path: Path) -> None:
    metadata = {"mean": "[0.5, 0.5]", "std": "[0.5, 0.5]"}
    save_file(file_state(classifier()), tmp_path / "a.safetensors", metadata=metadata)
    with pytest.raises(WeightsError, match="2 channels"):
        load_classifier(tmp_path / "a.safetensors")
