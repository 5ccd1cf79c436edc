"""Common corruptions: published files in both layouts, generated ones, and what is said when they are missing."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mimir_fast.data import DataConfig
from mimir_fast.evaluation import comparison, evaluate
from mimir_fast.evaluation.claim import claims_of, issue
from mimir_fast.evaluation.corruption_error import (
    CORRUPTIONS,
    SEVERITIES,
    mean_corruption_error,
    relative_corruption_error,
)
from mimir_fast.evaluation.images import EvaluationImages, load_images
from mimir_fast.evaluation.topics.corruptions import (
    MissingCorruptionsError,
    errors_in_words,
    generate,
    load_published,
    published_levels,
)


@pytest.fixture
def clean() -> EvaluationImages:
    """Every third of ten images."""
    samples = torch.tensor([0, 3, 6, 9])
    return EvaluationImages(
        torch.zeros(4, 3, 32, 32, dtype=torch.uint8), samples % 5, samples, ("a",) * 5, "cifar10", {}
    )


def write_arrays(root: Path, names: tuple[str, ...]) -> None:
    """CIFAR-10-C in small: pixel value 10·severity + image number."""
    for name in names:
        values = np.array([10 * severity + image for severity in SEVERITIES for image in range(10)], np.uint8)
        np.save(root / f"{name}.npy", np.broadcast_to(values[:, None, None, None], (50, 32, 32, 3)))
    np.save(root / "labels.npy", np.tile(np.arange(10) % 5, 5))


def test_cifar_c_rows_of_severity_and_image(tmp_path: Path, clean: EvaluationImages) -> None:
    write_arrays(tmp_path, ("fog", "gaussian_noise"))
    assert published_levels(tmp_path) == {"gaussian_noise": SEVERITIES, "fog": SEVERITIES}
    for severity in SEVERITIES:
        images = load_published(tmp_path, "fog", severity, clean, DataConfig())
        assert images.images[:, 0, 0, 0].tolist() == [10 * severity + i for i in (0, 3, 6, 9)]
        assert torch.equal(images.labels, clean.labels)


def test_imagenet_c_folders_match_the_validation_folder(tmp_path: Path) -> None:
    from PIL import Image

    for number in range(6):
        for root in ("clean/val", "c/snow/1", "c/snow/2"):
            folder = tmp_path / root / f"n{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            shade = number * 20 + (100 if root.endswith("2") else 0)
            Image.new("RGB", (8, 8), (shade, shade, shade)).save(folder / f"ILSVRC2012_val_{number}.png")
    config = DataConfig(source="folder", root=str(tmp_path / "clean"), image_size=8)
    clean = load_images(config, np.array([1, 4]))
    corrupted = load_published(tmp_path / "c", "snow", 2, clean, config)
    assert torch.equal(corrupted.images, clean.images + 100)
    assert torch.equal(corrupted.labels, clean.labels)


def test_missing_files_say_where_to_get_them(tmp_path: Path, clean: EvaluationImages) -> None:
    for root in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(MissingCorruptionsError, match=r"zenodo\.2535967"):
            published_levels(root)
    write_arrays(tmp_path, ("fog",))
    with pytest.raises(MissingCorruptionsError, match=r"snow\.npy is missing"):
        load_published(tmp_path, "snow", 1, clean, DataConfig())


def test_corruptions_of_other_data_are_refused(tmp_path: Path, clean: EvaluationImages) -> None:
    write_arrays(tmp_path, ("fog",))
    np.save(tmp_path / "labels.npy", np.zeros(50, np.int64))
    with pytest.raises(ValueError, match="another data set"):
        load_published(tmp_path, "fog", 1, clean, DataConfig())
    np.save(tmp_path / "labels.npy", np.zeros(7, np.int64))
    with pytest.raises(ValueError, match="damaged"):
        load_published(tmp_path, "fog", 1, clean, DataConfig())


def test_mean_corruption_error_against_the_papers_table() -> None:
    """Table 1 of arXiv 1903.12261: AlexNet's errors as printed, and ResNet-50's CEs, whose mean is its mCE of 76.7.

    Its error without corruption is 23.9 %, and its relative mCE 105.0 there.
    """
    alexnet = {
        "brightness": 56.5, "contrast": 85.3, "defocus_blur": 82.0, "elastic_transform": 64.6, "fog": 81.9,
        "frost": 82.7, "gaussian_noise": 88.6, "glass_blur": 82.6, "impulse_noise": 92.3, "jpeg_compression": 60.7,
        "motion_blur": 78.6, "pixelate": 71.8, "shot_noise": 89.4, "snow": 86.7, "zoom_blur": 79.8,
    }  # fmt: skip
    resnet50 = {
        "brightness": 57, "contrast": 71, "defocus_blur": 75, "elastic_transform": 85, "fog": 66, "frost": 75,
        "gaussian_noise": 80, "glass_blur": 89, "impulse_noise": 83, "jpeg_compression": 77, "motion_blur": 78,
        "pixelate": 77, "shot_noise": 82, "snow": 78, "zoom_blur": 80,
    }  # fmt: skip
    spread = {1: -0.04, 2: -0.02, 3: 0.0, 4: 0.02, 5: 0.04}  # severities are averaged before they are compared
    error = {
        name: {s: ce / 100 * alexnet[name] / 100 + spread[s] for s in SEVERITIES} for name, ce in resnet50.items()
    }  # fmt: skip
    assert mean_corruption_error(error) == pytest.approx(76.7, abs=0.3)
    assert relative_corruption_error(error, 0.239) == pytest.approx(105.0, abs=0.5)
    del error["fog"]
    assert mean_corruption_error(error) is None and relative_corruption_error(error, 0.239) is None


def test_generated_corruptions_can_be_repeated_and_leave_the_random_state_alone() -> None:
    pixels = torch.randint(0, 256, (3, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    clean = EvaluationImages(pixels, torch.zeros(3, dtype=torch.long), torch.arange(3), ("a",), "noise", {})
    state = np.random.get_state()[1].copy()
    found = {name: generate(clean, name, 3) for name in ("gaussian_noise", "impulse_noise", "fog")}
    assert (np.random.get_state()[1] == state).all()
    for name, corrupted in found.items():
        assert corrupted.images.shape == pixels.shape and not torch.equal(corrupted.images, pixels)
        one = generate(clean.take(torch.tensor([2])), name, 3)
        assert torch.equal(one.images[0], corrupted.images[2]), "a function of the sample, not of the batch"


@pytest.fixture
def benchmark(tmp_path: Path) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """CIFAR-10-C in small, 8 × 8 pixels: all corruptions, each severity with more noise; images and labels."""
    generator = np.random.default_rng(0)
    images, labels = generator.integers(0, 256, (12, 8, 8, 3)), np.arange(12) % 3
    root = tmp_path / "c"
    root.mkdir()
    for name in CORRUPTIONS:
        noisy = [images + generator.normal(0, 60 * s, images.shape) for s in SEVERITIES]
        np.save(root / f"{name}.npy", np.concatenate(noisy).clip(0, 255).astype(np.uint8))
    np.save(root / "labels.npy", np.tile(labels, 5))
    return root, torch.tensor(images.transpose(0, 3, 1, 2), dtype=torch.uint8), torch.tensor(labels)


def as_if_of(source: str, evaluation: comparison.Evaluation) -> comparison.Evaluation:
    results = evaluation.results
    return replace(evaluation, results=replace(results, images={**results.images, "source": source}))


def test_the_suite_measures_the_whole_benchmark_and_calls_nothing_robust(
    benchmark: tuple[Path, torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    root, images, labels = benchmark
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3))
    solution = torch.linalg.lstsq(images.flatten(1).double() / 255, 3 * torch.eye(3).double()[labels]).solution
    model[1].weight.data.copy_(solution.T)
    model[1].bias.data.zero_()
    with pytest.raises(ValueError, match="suite corruptions needs them"):
        evaluate(model, images, labels, suite="corruptions")
    results = evaluate(
        model, images, labels, suite="corruptions", corruptions=str(root), output_dir=str(tmp_path / "out")
    )  # fmt: skip
    found = results.sections["corruptions"]
    right = []
    for name in CORRUPTIONS:
        x = torch.tensor(np.load(root / f"{name}.npy").transpose(0, 3, 1, 2)).float() / 255
        right.append(float((model(x).argmax(dim=1) == labels.repeat(5)).float().mean()))
        assert found["means"][name] == pytest.approx(right[-1])
    assert found["mean"] == pytest.approx(sum(right) / 15) and 0 < found["mean"] < results.clean["accuracy"] == 1
    assert found["mean_error"] == pytest.approx(1 - found["mean"])
    assert found["mce"] is None and found["relative_mce"] is None, "AlexNet's errors are those on ImageNet-C"
    assert list(results.sections["accuracy"]["attacks"]) == ["natural"] and "classes" not in results.sections
    assert results.verdicts["robustness"]["large"] == "Not attacked"
    assert "worst case" not in results.rows["markdown"] and "mean of 15 of 15 corruptions" in results.rows["markdown"]
    page = (tmp_path / "out/report.html").read_text()
    assert "(15 of 15 corruptions, severities 1 2 3 4 5)" in page and "worst case" not in page.partition("<script")[0]
    assert "Mean error, not normalised by AlexNet" in page

    evaluations = comparison.load([tmp_path / "out", tmp_path / "out"])
    head, line, _ = comparison.main_table(evaluations)
    assert dict(zip(head, line, strict=True))["worst case"] == ""
    assert dict(zip(head, line, strict=True))["mean of 15 of 15 corruptions"] == f"{100 * found['mean']:.1f} %"
    assert [d.measure for d in comparison.differences(evaluations)] == ["no attack"]
    (claim,) = claims_of(as_if_of("cifar10", evaluations[0]))
    assert claim.path.parts[:3] == ("model_info", "cifar10", "corruptions") and claim.info["eps"] is None
    assert claim.info["corruptions_acc"] == claim.robust == f"{100 * found['mean']:.2f}"
    assert "autoattack_acc" not in claim.info
    assert claim.notes == ["It was evaluated on 12 images, the leaderboard is of 10000."]
    assert "- **Threat Model**: Common Corruptions\n- **eps**: N/A\n" in issue([claim])

    shown = comparison.html(evaluations)
    assert "<h2>Common corruptions</h2>" in shown and "15 of 15 corruptions, severities 1 2 3 4 5" in shown


def test_errors_relative_to_alexnet_are_shown_with_what_they_are_of() -> None:
    numbers = {"mce": 76.7, "relative_mce": 105.04, "mean": 0.4, "accuracy": {name: {} for name in CORRUPTIONS}}
    words = errors_in_words(numbers)
    assert words.count("(15 of 15 corruptions)") == 2 and "76.7 %" in words and "105.0 %" in words
    assert words.endswith("Mean error, not normalised: 60.0 %.")
