"""What is not the original's function is not written: nothing is left of it, and the error says why."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_exports import CASES, classifier, original_of, run_of
from torch import Tensor, nn

from mimir_fast.export import ExportConfig, export
from mimir_fast.exporting.compare import BATCHES, EXAMPLE, difference
from mimir_fast.exporting.formats import FORMATS, Format, register
from mimir_fast.exporting.original import Original
from mimir_fast.models.weight_files import WeightsError


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(classifier("vit"), tmp_path_factory.mktemp("runs") / "run")


def writer(change: Callable[[Tensor], Tensor], left: str = "model.bin") -> Callable[[Original, Path], float]:
    """A format that writes a file, and reads back a function that differs from the original as `change` says."""

    def write(original: Original, path: Path) -> float:
        path.write_text(left)
        return difference(lambda images: change(original.model(images)), original)

    return write


def only_two(logits: Tensor) -> Tensor:
    if len(logits) != 2:
        raise RuntimeError("Expected input to have size 2")
    return logits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: y + 1e-3 * y.abs().max(), r"differs from the original by 1\.0e-03 of its largest output"),
        (lambda y: y[:, :3], r"gives \(1, 3\) for a batch of 1, not \(1, 7\)"),
        (lambda y: y * float("nan"), r"differs from the original by nan"),
        (only_two, "cannot take a batch of 1: Expected input to have size 2"),
    ],
    ids=["another function", "another shape", "no numbers", "a fixed batch"],
)
def test_nothing_is_left_of_another_function(
    change: Callable[[Tensor], Tensor], message: str, run: Path, tmp_path: Path
) -> None:
    with FORMATS.restored():
        register(Format("mine", ".bin", writer(change), lambda original, path: "it"))
        with pytest.raises(ValueError, match=message):
            export(ExportConfig(str(run), str(tmp_path / "new" / "folder" / "m.bin"), format="mine"))
        assert not list(tmp_path.iterdir())
        (tmp_path / "m.bin").write_text("before")
        with pytest.raises(ValueError, match=message):
            export(ExportConfig(str(run), str(tmp_path / "m.bin"), format="mine", overwrite=True))
    assert (tmp_path / "m.bin").read_text() == "before" and len(list(tmp_path.iterdir())) == 1


def test_a_format_from_outside_is_written(run: Path, tmp_path: Path) -> None:
    with FORMATS.restored():
        register(Format("mine", ".bin", writer(lambda y: y + 1e-6), lambda original, path: "it"))
        assert export(ExportConfig(str(run), str(tmp_path / "m.bin"), format="mine")).read_text() == "model.bin"
    with pytest.raises(ValueError, match=r"unknown format 'mine'.*There are dcp, hf, onnx, pt2"):
        ExportConfig(str(run), "m.bin", format="mine")


def test_a_missing_package_is_named_before_anything_is_read(tmp_path: Path) -> None:
    with FORMATS.restored():
        register(Format("mine", ".bin", writer(torch.clone), lambda o, p: "", needs=("no_such_package",), extra="mine"))
        with pytest.raises(ImportError, match=r"needs no_such_package: pip install .*\[mine\]"):
            export(ExportConfig(str(tmp_path / "nowhere"), str(tmp_path / "m.bin"), format="mine"))


def test_the_comparison_sees_sizes_that_became_constants() -> None:
    assert 1 in BATCHES and EXAMPLE not in BATCHES and any(batch > 1 for batch in BATCHES)


def test_outputs_that_are_no_numbers_are_not_exported() -> None:
    model = classifier("vit")
    nn.init.constant_(model.head.bias, float("nan"))
    with pytest.raises(ValueError, match="gives NaN or infinity on random images"):
        difference(lambda images: images, original_of(model))


def test_names_and_folders(run: Path, tmp_path: Path) -> None:
    for form, suffix in (("onnx", r"\.onnx"), ("pt2", r"\.pt2"), ("torchscript", r"\.ts"), ("timm", r"\.safetensors")):
        with pytest.raises(ValueError, match=f"wanted a name that ends in {suffix}"):
            ExportConfig(str(run), "model.bin", format=form)
    with pytest.raises(ValueError, match="writes a folder, give a name without a suffix"):
        ExportConfig(str(run), "model.safetensors", format="hf")
    (tmp_path / "folder.ts").mkdir()
    with pytest.raises(FileExistsError, match="is a folder"):
        export(ExportConfig(str(run), str(tmp_path / "folder.ts"), format="torchscript", overwrite=True))


def test_an_incomplete_encoder_is_refused() -> None:
    original = original_of(CASES["vit"].masked_model())
    del original.tensors["blocks.1.mlp.fc1.bias"]
    with pytest.raises(WeightsError, match=r"blocks\.1\.mlp\.fc1\.bias \(1 in all\) are not in it"):
        _ = original.model
