"""Exported files: timm's model gives the same features, and our own commands read them back."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from file_state import file_state, load_file_state
from safetensors import safe_open
from safetensors.torch import load_file

from mimir_fast.checkpoints.saving import save_checkpoint
from mimir_fast.export import ExportConfig, export
from mimir_fast.models.classifier import ClassifierConfig, build_classifier, load_classifier
from mimir_fast.models.masked_model import ModelConfig, View, build_masked_model
from mimir_fast.models.weight_files import WeightsError, read_weights
from mimir_fast.ops.patches import patchify


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    """A pre-training run's folder, and the model in it."""
    torch.manual_seed(0)
    model = build_masked_model(ModelConfig(encoder="tiny", patch_size=8), image_size=32)
    run = tmp_path_factory.mktemp("runs") / "mimir"
    tensors = {f"model/{n}": t.detach() for n, t in file_state(model).items()}
    save_checkpoint(run / "checkpoints" / "step-00000001", tensors, {"step": 1, "config": {"model": {}}})
    return run, model


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    """A fine-tuning run's folder, and the model in it."""
    torch.manual_seed(1)
    model = build_classifier(ClassifierConfig(encoder="tiny", patch_size=8, normalization="half"), 32, 10)
    torch.nn.init.normal_(model.head.weight)
    run = tmp_path_factory.mktemp("runs") / "pgd"
    tensors = {f"model/{n}": t.detach() for n, t in file_state(model).items()}
    config = {"model": {"normalization": "half"}}
    save_checkpoint(run / "checkpoints" / "step-00000001", tensors, {"step": 1, "config": config})
    return run, model.eval()


def timm_model(path: Path) -> tuple[torch.nn.Module, dict[str, str]]:
    """timm's model, built from nothing but the file."""
    timm_vit = pytest.importorskip("timm.models.vision_transformer")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    model = timm_vit.VisionTransformer(**json.loads(metadata["timm"]))
    load_file_state(model, load_file(path))
    return model.eval(), metadata


def test_an_encoder_has_timms_features(pretrained: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    run, model = pretrained
    theirs, _ = timm_model(export(ExportConfig(str(run), str(tmp_path / "encoder.safetensors"))))
    images = torch.rand(2, 3, 32, 32)
    everything = torch.arange(16).expand(2, -1)
    ours = model.encode(View(patchify(images, 8), everything))
    torch.testing.assert_close(ours, theirs.forward_features(images), rtol=1e-4, atol=1e-5)


def test_a_classifier_has_timms_logits(finetuned: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    run, model = finetuned
    theirs, metadata = timm_model(export(ExportConfig(str(run), str(tmp_path / "robust.safetensors"))))
    images = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(json.loads(metadata[key]))[:, None, None] for key in ("mean", "std"))
    torch.testing.assert_close(model(images), theirs((images - mean) / std), rtol=1e-4, atol=1e-5)


def test_our_own_format_reads_back(finetuned: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    run, model = finetuned
    path = export(ExportConfig(str(run), str(tmp_path / "all.safetensors"), format="safetensors"))
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(load_classifier(path)(images), model(images))


def test_our_own_format_keeps_the_decoder(pretrained: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    run, model = pretrained
    path = export(ExportConfig(str(run), str(tmp_path / "all.safetensors"), format="safetensors"))
    assert set(load_file(path)) == set(file_state(model))


def test_a_folder_for_torch_distributed_checkpoint(
    finetuned: tuple[Path, torch.nn.Module], pretrained: tuple[Path, torch.nn.Module], tmp_path: Path
) -> None:
    """There and back, and by torch's own function into a model; an encoder goes on with its decoder."""
    (run, model), folder = finetuned, tmp_path / "dcp"
    for overwrite in (False, True):
        export(ExportConfig(str(run), str(folder), format="dcp", overwrite=overwrite))
    weights = read_weights(folder)
    assert weights.config and weights.normalization == read_weights(run).normalization is not None
    assert {n: t.tolist() for n, t in weights.tensors.items()} == {n: t.tolist() for n, t in file_state(model).items()}
    state = {name: torch.zeros_like(tensor) for name, tensor in file_state(model).items()}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    assert all(torch.equal(state[name], tensor) for name, tensor in file_state(model).items())
    export(ExportConfig(str(pretrained[0]), str(tmp_path / "masked"), format="dcp"))
    assert set(read_weights(tmp_path / "masked").tensors) == set(file_state(pretrained[1]))
    with pytest.raises(FileExistsError, match="is a checkpoint, which another file would damage"):
        export(ExportConfig(str(run), str(folder / "model.safetensors")))


def test_a_folder_that_a_trainer_wrote(finetuned: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    """As torchtitan: names under `model.`, an optimiser, numbers beside; nothing is said of the model."""
    state = {"model": finetuned[1].encoder.state_dict(), "optimizer": {"step": 3, "m": torch.ones(2)}, "step": 7}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    weights = read_weights(tmp_path)
    assert all(torch.equal(t, weights.tensors[n]) for n, t in finetuned[1].encoder.state_dict().items())
    assert weights.config is None and not any(name.startswith("optimizer") for name in weights.tensors)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match=r"was not written by this command .*: choose another --output"):
        export(ExportConfig(str(tmp_path), str(tmp_path), format="dcp", overwrite=True))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_bad_input(pretrained: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
    taken = tmp_path / "taken.safetensors"
    taken.touch()
    with pytest.raises(FileExistsError, match="--overwrite"):
        export(ExportConfig(str(pretrained[0]), str(taken)))
    with pytest.raises(ValueError, match=r"ends in \.safetensors"):
        ExportConfig(str(pretrained[0]), "model.pth")
    with pytest.raises(WeightsError, match="no checkpoint in"):
        export(ExportConfig(str(tmp_path), str(tmp_path / "new.safetensors")))


def test_a_file_may_become_itself_and_a_checkpoint_stays_whole(
    finetuned: tuple[Path, torch.nn.Module], tmp_path: Path
) -> None:
    run, _ = finetuned
    with pytest.raises(FileExistsError, match="holds the checkpoints of a run"):
        export(ExportConfig(str(run), str(run / "checkpoints" / "hf"), format="dcp"))
    path = tmp_path / "all.safetensors"
    export(ExportConfig(str(run), str(path), format="safetensors"))
    before = load_file(path)
    export(ExportConfig(str(path), str(path), format="safetensors", overwrite=True))
    after = load_file(path)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    checkpoint = run / "checkpoints" / "step-00000001"
    (inside,) = checkpoint.glob("*.safetensors")
    with pytest.raises(FileExistsError, match="is a checkpoint, which another file would damage"):
        export(ExportConfig(str(run), str(inside), overwrite=True))
