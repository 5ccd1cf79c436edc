"""TorchScript, torch.export and ONNX files: their own library reads them and computes the same, for any batch."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_exports import CASES, FAMILIES, classifier, original_of, run_of
from torch import Tensor, nn

from mimir_fast.attacks.pgd import pgd
from mimir_fast.attacks.threat_model import LinfThreat
from mimir_fast.evaluation.adapters import load_model
from mimir_fast.export import ExportConfig, export
from mimir_fast.exporting.formats import FORMATS
from mimir_fast.models.families import find_family

CPU = torch.device("cpu")
SUFFIX = {"torchscript": ".ts", "pt2": ".pt2", "onnx": ".onnx"}


def slow_but_for(*quick: str) -> list[object]:
    """The families, those that take long marked so: torch.export takes seconds a model, ONNX's exporter ten."""
    return [pytest.param(f, marks=[] if f in quick else [pytest.mark.slow]) for f in FAMILIES]


def written(model: nn.Module, form: str, folder: Path) -> Path:
    path = folder / f"model{SUFFIX[form]}"
    FORMATS.find(form).write(original_of(model), path)
    return path


def run_onnx(path: Path, images: Tensor) -> Tensor:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    assert given.name == "images" and given.shape == ["batch", *images.shape[1:]]
    return torch.from_numpy(session.run([made.name], {"images": images.numpy()})[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_torchscript_of_every_family(family: str, tmp_path: Path) -> None:
    model = classifier(family)
    read = torch.jit.load(written(model, "torchscript", tmp_path))
    for batch in (1, 5):
        images = CASES[family].images(batch)
        torch.testing.assert_close(read(images), model(images), rtol=1e-5, atol=1e-6)
    # A device in the graph would be the one it was recorded on, wherever it is loaded.
    assert "Device" not in str(read.inlined_graph) and "mimir_fast::" not in str(read.inlined_graph)


@pytest.mark.parametrize("family", slow_but_for("convnext"))
def test_torch_export_of_every_family(family: str, tmp_path: Path) -> None:
    model = classifier(family)
    program = torch.export.load(written(model, "pt2", tmp_path))
    for batch in (1, 2, 5):
        images = CASES[family].images(batch)
        torch.testing.assert_close(program.module()(images), model(images), rtol=1e-5, atol=1e-6)
    assert "mimir_fast" not in program.graph_module.code


@pytest.mark.parametrize("family", slow_but_for("vit"))
def test_onnx_of_every_family(family: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    model = classifier(family)
    path = written(model, "onnx", tmp_path)
    for batch in (1, 2, 5):
        images = CASES[family].images(batch)
        torch.testing.assert_close(run_onnx(path, images), model(images), rtol=1e-5, atol=1e-6)
    assert str(Path(__file__).parents[2]).encode() not in path.read_bytes(), (
        "where the source lies is nobody's business"
    )


@pytest.mark.parametrize("form", ["torchscript", pytest.param("pt2", marks=[pytest.mark.slow])])
@pytest.mark.parametrize("family", slow_but_for("vit"))
def test_gradients_are_the_originals(family: str, form: str, tmp_path: Path) -> None:
    """An attack on the file takes the steps it would take on the model."""
    model, images = classifier(family).requires_grad_(False), CASES[family].images(3)
    judged = load_model(str(written(model, form, tmp_path)), num_classes=7, device=CPU)
    labels, threat = torch.arange(3), LinfThreat(8 / 255, 2 / 255, 3)

    def gradient(module: nn.Module) -> Tensor:
        x = images.clone().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(module(x), labels), x)[0]

    wanted, found = gradient(model), gradient(judged.module)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    clear = wanted.abs() > 1e-4 * wanted.abs().max()
    assert clear.float().mean() > 0.9 and torch.equal(found.sign()[clear], wanted.sign()[clear])
    ours, theirs = (pgd(module, images, labels, threat, mode="eval") for module in (model, judged.module))
    assert (ours != theirs).float().mean() < 0.01


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_an_encoder_gives_its_tokens(family: str, tmp_path: Path) -> None:
    model, images = CASES[family].masked_model().eval(), CASES[family].images(3)
    read = torch.jit.load(written(model, "torchscript", tmp_path))
    tokens = read(images)
    assert tokens.shape == (3, model.encoder.num_prefix + model.num_patches, model.encoder.width)
    # timm's class of the same weights says what the tokens are.
    exported = find_family(family).to_timm(original_of(model).without_decoder, CASES[family].architecture)
    made: dict[str, nn.Module] = {}
    exec(exported.code, made)
    made["model"].load_state_dict(exported.tensors)
    features = made["model"].eval().forward_features(images)  # type: ignore[operator]
    torch.testing.assert_close(tokens, features.flatten(1, -2), rtol=1e-4, atol=1e-5)


def test_grey_images_and_either_pooling(tmp_path: Path) -> None:
    from family_checks import Case

    case = Case("vit", "nano", 16, 4, channels=1)
    model = case.classifier(normalization="half", global_pool="cls")
    read = torch.jit.load(written(model, "torchscript", tmp_path))
    torch.testing.assert_close(read(case.images(3)), model(case.images(3)), rtol=1e-5, atol=1e-6)


def test_the_command_says_what_was_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(classifier("vit"), tmp_path / "run")
    path = export(ExportConfig(str(run), str(tmp_path / "new" / "robust.ts"), format="torchscript"))
    said = capsys.readouterr().out
    assert "written, format torchscript: its logits are the original's up to" in said and "batches of 1 and 3" in said
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(FileExistsError, match="--overwrite"):
        export(ExportConfig(str(run), str(path), format="torchscript"))
    export(ExportConfig(str(run), str(path), format="torchscript", overwrite=True))


def test_onnx_cannot_be_attacked(tmp_path: Path) -> None:
    (tmp_path / "robust.onnx").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"no gradients, which attacks need: give the \.pt2"):
        load_model(str(tmp_path / "robust.onnx"), num_classes=7, device=CPU)
