"""Whatever an option names is opened before anything is measured, and means what it says."""

import shutil
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from file_state import file_state
from PIL import Image
from safetensors.torch import save_file
from small_classifier import EPS, SmallNet
from torch import nn

from mimir_fast.attacks.adaptive import has_features
from mimir_fast.data import DataConfig, build_source
from mimir_fast.evaluation import evaluate
from mimir_fast.evaluation.config import EvaluateConfig
from mimir_fast.evaluation.corruption_error import CORRUPTIONS, mean_of
from mimir_fast.evaluation.images import EvaluationImages, choose_indices
from mimir_fast.evaluation.robustbench_zoo import package_folder
from mimir_fast.evaluation.topic import Setup
from mimir_fast.evaluation.topics import accuracy
from mimir_fast.evaluation.topics.corruptions import published_levels
from mimir_fast.evaluation.topics.shifts import open_folder
from mimir_fast.evaluation.wrappers import Normalized

QUICK: dict[str, Any] = {"suite": "table", "autoattack": "no", "eps": EPS, "limit": 6}


def write_folder(root: Path, images: EvaluationImages, count: int = 12, names: Any = str) -> Path:
    for number in range(count):
        folder = root / names(int(images.labels[number]))
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images.images[number, 0].numpy()).save(folder / f"{number}.png")
    return root


class TestIndexFiles:
    @pytest.fixture
    def config(self, tmp_path: Path) -> DataConfig:
        """Three classes that number their images alike."""
        for name in "abc":
            (tmp_path / "data" / "val" / name).mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (8, 8)).save(tmp_path / "data" / "val" / name / f"{number:04d}.png")
        return DataConfig(source="folder", root=str(tmp_path / "data"), image_size=8)

    def chosen(self, config: DataConfig, file: Path, lines: list[str]) -> list[int]:
        file.write_text("\n".join(lines))
        return choose_indices(build_source(config, "test"), None, str(file)).tolist()

    def test_paths_are_told_apart_by_their_folders(self, config: DataConfig, tmp_path: Path) -> None:
        lines = [f"{name}/{number:04d}.png {label}" for label, name in enumerate("abc") for number in range(3)]
        assert self.chosen(config, tmp_path / "list", lines) == [0, 1, 2, 4, 5, 6, 8, 9, 10]
        whole = str(Path(str(config.root)) / "val" / "b" / "0003.png")
        assert self.chosen(config, tmp_path / "list", [whole, "val/a/0001.png"]) == [1, 7]

    @pytest.mark.parametrize(
        ("line", "words"),
        [
            ("0001.png", r"0001\.png, which 3 images of folder end in \(.*a/0001\.png, .*CLASS/FILE"),
            ("d/0001.png", r"d/0001\.png, which folder lacks \(.*a/0001\.png"),
            ("a/0009.png", "lacks$"),
            ("a/0000.png", "1 line names an image that a line before names"),
        ],
    )
    def test_what_is_not_one_image_is_refused(self, config: DataConfig, tmp_path: Path, line: str, words: str) -> None:
        with pytest.raises(ValueError, match=words):
            self.chosen(config, tmp_path / "list", ["a/0000.png 0", line])

    def test_positions_twice(self, config: DataConfig, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"2 lines name an image.*such as 3"):
            self.chosen(config, tmp_path / "list", ["3", "1", "3", "1"])


class TestShifts:
    def test_classes_called_by_numbers_are_meant_by_name(self, digits_images: EvaluationImages, tmp_path: Path) -> None:
        classes = tuple(str(number) for number in range(1, 11))  # the class at position 1 is called "2"
        for number in (1, 2, 10):
            (tmp_path / "named" / str(number)).mkdir(parents=True)
            Image.new("L", (8, 8)).save(tmp_path / "named" / str(number) / "x.png")
        # In the order of the names: 1, 10, 2.
        assert open_folder(tmp_path / "named", classes).labels.tolist() == [0, 9, 1]
        shutil.copytree(tmp_path / "named", tmp_path / "other")
        shutil.move(tmp_path / "other" / "10", tmp_path / "other" / "0")
        with pytest.raises(ValueError, match=r"such as 0, are none of the 10 classes \(1, …\); name them so$"):
            open_folder(tmp_path / "other", classes)
        assert open_folder(tmp_path / "other", ("cat", "dog", "owl")).labels.tolist() == [0, 1, 2], "as ImageNet-V2 is"

    def test_folders_of_one_name_and_in_any_order(
        self, small_model: nn.Module, digits_images: EvaluationImages, tmp_path: Path
    ) -> None:
        folders = [str(write_folder(tmp_path / name, digits_images, count)) for name, count in (
            ("one/v2", 12), ("two/v2", 9), ("sketch", 6))]  # fmt: skip
        found = []
        for asked in (folders, [*folders[::-1], folders[0]]):
            results = evaluate(
                small_model, digits_images.images, digits_images.labels, shifts=asked,
                output_dir=str(tmp_path / "out"), **QUICK,
            )  # fmt: skip
            found.append(results.sections["shifts"])
        assert {name: e["total"] for name, e in found[0].items()} == {folders[0]: 12, folders[1]: 9, "sketch": 6}
        assert found[0] == found[1], "the second time nothing was measured anew"


class TestCorruptions:
    def test_a_mean_says_what_it_is_of(
        self, small_model: nn.Module, digits_images: EvaluationImages, tmp_path: Path
    ) -> None:
        for severity in (2, 4):
            write_folder(tmp_path / "c" / "fog" / str(severity), digits_images, 300)
        assert published_levels(tmp_path / "c") == {"fog": (2, 4)}
        # As folders are read: class by class, by the names of the files.
        order = sorted(range(300), key=lambda k: (int(digits_images.labels[k]), f"{k}.png"))
        images = digits_images.take(torch.tensor(order))
        results = evaluate(small_model, images.images, images.labels, corruptions=str(tmp_path / "c"), **QUICK)
        section = results.sections["corruptions"]
        assert section["mean_of"] == "1 of 15 corruptions, severities 2 4: not the benchmark's mean"
        assert section["mean"] == results.clean["accuracy"], "these files are the clean images"
        whole = dict.fromkeys(CORRUPTIONS, dict.fromkeys((1, 2, 3, 4, 5), 0.5))
        assert mean_of(whole) == "15 of 15 corruptions, severities 1 2 3 4 5"
        assert "different severities" in mean_of({**whole, "fog": {1: 0.5}})


class TestBeforeAnythingIsMeasured:
    def refused(
        self, images: EvaluationImages, words: str, error: type[Exception] = ValueError, **options: Any
    ) -> None:
        lines: list[str] = []
        with pytest.raises(error, match=words):
            evaluate(SmallNet(), images.images, images.labels, log=lines.append, **{**QUICK, **options})
        assert not lines, "a line is said when the plan is made, and one after each measurement"

    def test_other_models(self, digits_images: EvaluationImages, tmp_path: Path) -> None:
        missing = str(tmp_path / "nothing.pth")
        self.refused(
            digits_images, f"^--transfer_from {missing}: there is no such file", FileNotFoundError,
            transfer_from=(missing,),
        )  # fmt: skip
        self.refused(
            digits_images,
            "^--transfer_from small_classifier:SmallNet7: ",
            transfer_from=("small_classifier:SmallNet7",),
        )
        net = ("small_classifier:SmallNet",)
        self.refused(
            digits_images, "^--transfer_lgv needs training images: .*memory", transfer_from=net, transfer_lgv=1
        )

    def test_the_masked_autoencoder(self, digits_images: EvaluationImages, tmp_path: Path) -> None:
        from mimir_fast.models.masked_model import ModelConfig, build_masked_model

        self.refused(digits_images, "nothing", (ValueError, FileNotFoundError), pretrained=str(tmp_path / "nothing"))  # type: ignore[arg-type]
        model = build_masked_model(ModelConfig(encoder="nano", patch_size=2), 8, 3)
        save_file(dict(file_state(model)), tmp_path / "colour.safetensors")
        path = str(tmp_path / "colour.safetensors")
        self.refused(digits_images, r"--pretrained .* does not take images of shape \(1, 8, 8\)", pretrained=path)

    def test_shifts_and_corruptions(self, digits_images: EvaluationImages, tmp_path: Path) -> None:
        for name in ("shift/1", "c/fog/1/0"):
            (tmp_path / name).mkdir(parents=True)
            (tmp_path / name / "x.png").write_bytes(b"no image")
        self.refused(digits_images, "shift: 1 image, and none is readable", shifts=(str(tmp_path / "shift"),))
        self.refused(digits_images, "has 1 image, memory asks for", corruptions=str(tmp_path / "c"))
        (tmp_path / "c10").mkdir()
        np.save(tmp_path / "c10" / "labels.npy", np.zeros(1500, np.int64))
        np.save(tmp_path / "c10" / "snow.npy", np.zeros((1500, 8, 8, 3), np.uint8))
        self.refused(digits_images, "another data set's", corruptions=str(tmp_path / "c10"))
        np.save(tmp_path / "c10" / "snow.npy", np.zeros((1500, 32, 32, 3), np.uint8))
        self.refused(digits_images, "32 × 32 pixels, memory is evaluated at 8 × 8", corruptions=str(tmp_path / "c10"))

    @pytest.mark.parametrize("suite", ["paper", "full"])
    def test_a_normalisation_in_front_of_any_model(self, suite: Literal["paper", "full"]) -> None:
        """A wrapper shows features only where its model does: PGD-MI is planned for the second one alone."""
        plain = Normalized(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), (0.5,), (0.5,))
        config = EvaluateConfig("a model", suite=suite)
        for model, wanted in ((plain, False), (Normalized(SmallNet(), (0.5,), (0.5,)), True)):
            setup = Setup(config, 6, tuple("ab"), has_features(model), True, lambda spec: plain)
            assert ("pgd_mi100" in [item.name for item in accuracy.measurements(setup)]) is wanted


def test_torchattacks_folder_is_not_robustbench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ships an old copy of a part of the package, without the list of images."""
    from mimir_fast.evaluation.adapters import load_model

    (tmp_path / "robustbench").mkdir()
    (tmp_path / "robustbench" / "__init__.py").write_text("raise RuntimeError('it was imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "robustbench", raising=False)
    assert package_folder() is None
    with pytest.raises(ImportError, match="old one that torchattacks brings"):
        load_model("robustbench:cifar10/Linf/Standard", num_classes=10, device=torch.device("cpu"))
    with pytest.raises(FileNotFoundError, match="pip install --no-deps robustbench"):
        choose_indices(build_source(DataConfig(image_size=8, channels=1), "test"), None, "robustbench")
    (tmp_path / "robustbench" / "helper_files").mkdir()
    assert package_folder() == tmp_path / "robustbench"
