"""The Hub, without a network: folders as they would lie there, its cache, and what an upload would carry."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import command_environment
from file_state import file_state
from safetensors.torch import load, load_file, save_file

from mimir_fast.checkpoints.reading import checkpoints_of
from mimir_fast.checkpoints.saving import save_checkpoint
from mimir_fast.evaluation.results import FORMAT, VERSION
from mimir_fast.export import ExportConfig, export
from mimir_fast.hub import HubClassifier, HubMaskedModel
from mimir_fast.models.classifier import Classifier, ClassifierConfig, build_classifier, load_classifier
from mimir_fast.models.masked_model import MaskedModel, ModelConfig, View, build_masked_model
from mimir_fast.models.weight_files import WeightsError
from mimir_fast.ops.patches import patchify
from mimir_fast.publish import HubConfig, publish

CONFIG = {
    "recipe": "digits/pgd_vit_tiny", "method": "pgd", "init": "/home/me/runs/mimir", "model": {"normalization": "half"},
    "data": {"source": "digits", "root": "/home/me/data", "image_size": 32, "channels": 3},
    "objective": {"attack": {"eps": 8 / 255, "alpha": 2 / 255, "num_steps": 10}},
    "run": {"epochs": 3, "output_dir": "/home/me/out"},
}  # fmt: skip


def evaluation(checkpoint: str) -> dict[str, Any]:
    """results.json with the parts a card shows."""
    counts = {"correct": 61, "total": 100, "accuracy": 0.61, "interval": [0.51, 0.70]}
    natural = counts | {"correct": 90, "accuracy": 0.9, "label": "no attack"}
    return {
        "format": FORMAT, "version": VERSION, "choices": {"checkpoint": checkpoint},
        "notes": ["Few images."],
        "verdicts": {"robustness": {"text": "It keeps half."}, "validity": {"text": "No sign against it."}},
        "images": {"source": "digits", "split": "test", "count": 100, "classes": 10},
        "sections": {"accuracy": {"attacks": {"natural": natural}, "robust": counts, "tried": ["PGD-20"],
                                  "norm": "linf", "eps_text": "8/255"}},
        "command": f"evaluate --checkpoint {checkpoint}",
        "rows": {"markdown": f"| model | natural | worst case |\n| - | - | - |\n| {checkpoint} | 90.0 | 61.0 |"},
    }  # fmt: skip


def save_run(run: Path, model: torch.nn.Module, config: dict[str, Any]) -> Path:
    tensors = {f"model/{n}": t.detach() for n, t in file_state(model).items()}
    save_checkpoint(run / "checkpoints" / "step-00000001", tensors, {"step": 1, "config": config})
    return run


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Classifier]:
    """A fine-tuning run's folder, evaluated, and the model in it."""
    torch.manual_seed(1)
    model = build_classifier(ClassifierConfig(encoder="nano", patch_size=8, normalization="half"), 32, 10)
    torch.nn.init.normal_(model.head.weight)
    run = save_run(tmp_path_factory.mktemp("runs") / "pgd", model, CONFIG)
    (run / "evaluation" / "quick").mkdir(parents=True)
    (run / "evaluation" / "quick" / "results.json").write_text(json.dumps(evaluation("/home/me/runs/pgd")))
    return run, model.eval()


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MaskedModel]:
    """A pre-training run's folder, and the model in it."""
    torch.manual_seed(0)
    model = build_masked_model(ModelConfig(encoder="nano", patch_size=8), image_size=32)
    return save_run(tmp_path_factory.mktemp("runs") / "mimir", model, {"method": "mimir", "model": {}}), model.eval()


def test_a_classifier_comes_back(finetuned: tuple[Path, Classifier], tmp_path: Path) -> None:
    run, model = finetuned
    HubClassifier.from_run(run).save_pretrained(tmp_path / "robust")
    assert {p.name for p in (tmp_path / "robust").iterdir()} == {
        "README.md", "config.json", "model.safetensors", "results.json"
    }  # fmt: skip
    again = HubClassifier.from_pretrained(tmp_path / "robust")
    assert isinstance(again, Classifier) and not again.training and again.config.normalization == "half"
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(again(images), model(images))
    # The weights are a file our commands take, and a second saving says the same.
    assert torch.equal(load_classifier(tmp_path / "robust" / "model.safetensors")(images), model(images))
    again.save_pretrained(tmp_path / "again" / "robust")
    for name in ("README.md", "config.json", "results.json"):
        assert (tmp_path / "again" / "robust" / name).read_text() == (tmp_path / "robust" / name).read_text()


def test_timm_and_transformers_load_the_folder(finetuned: tuple[Path, Classifier], tmp_path: Path) -> None:
    """Without this package: timm builds it from config.json, transformers from the same through timm."""
    timm, transformers = (pytest.importorskip(name) for name in ("timm", "transformers"))
    HubClassifier.from_run(finetuned[0]).save_pretrained(tmp_path / "robust")
    images = torch.randint(256, (2, 3, 32, 32)) / 255  # the processor of transformers makes bytes of them
    model = timm.create_model(f"local-dir:{tmp_path / 'robust'}", pretrained=True).eval()
    data = timm.data.resolve_model_data_config(model)
    assert data["input_size"] == (3, 32, 32) and data["mean"] == data["std"] == [0.5, 0.5, 0.5]
    with torch.no_grad():
        expected = finetuned[1](images)
        torch.testing.assert_close(model((images - 0.5) / 0.5), expected, rtol=1e-4, atol=1e-5)
        theirs = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "robust").eval()
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "robust")
        pixels = processor(list(images), return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(theirs(pixels).logits, expected, rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "robust" / "config.json").read_text())["mimir_fast"]["recipe"] == CONFIG["recipe"]


def test_a_model_is_loaded_without_a_parser_of_command_lines(
    finetuned: tuple[Path, Classifier], tmp_path: Path
) -> None:
    HubClassifier.from_run(finetuned[0]).save_pretrained(tmp_path / "robust")
    (tmp_path / "robust" / "results.json").unlink()
    code = (
        "import sys; sys.modules['tyro'] = None\nfrom mimir_fast.hub import HubClassifier\n"
        f"HubClassifier.from_pretrained({str(tmp_path / 'robust')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=command_environment())


def test_a_masked_model_comes_back(pretrained: tuple[Path, MaskedModel], tmp_path: Path) -> None:
    run, model = pretrained
    publish(HubConfig(str(run), output=str(tmp_path / "masked")))
    again = HubMaskedModel.from_pretrained(tmp_path / "masked")
    images = torch.rand(2, 3, 32, 32)
    view = View(patchify(images, 8)[:, :4], torch.arange(4).expand(2, -1))
    torch.testing.assert_close(again(view).prediction, model(view).prediction, rtol=1e-4, atol=1e-5)
    card = (tmp_path / "masked" / "README.md").read_text()
    assert "masked autoencoder" in card and "HubMaskedModel.from_pretrained" in card and "## Robustness" not in card


def test_the_card_says_what_is_known(finetuned: tuple[Path, Classifier], tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    HubClassifier.from_run(finetuned[0]).save_pretrained(tmp_path / "robust")
    card = ModelCard.load(tmp_path / "robust" / "README.md")
    assert card.data.library_name == "mimir_fast" and card.data.license == "apache-2.0"
    assert [r.metric_value for r in card.data.eval_results] == [90.0, 61.0]
    for words in ("ViT-nano", "ε = 8/255, α = 2/255, 10 steps", "| 90.0 | 61.0 |", "It keeps half.", "Few images.",
                  'HubClassifier.from_pretrained("robust")', "arXiv:2312.04960",
                  "pip install '.[train]'", "hf-hub:robust"):  # fmt: skip
        assert words in card.text


def test_an_unevaluated_model_claims_nothing(finetuned: tuple[Path, Classifier], tmp_path: Path) -> None:
    model = HubClassifier.from_run(finetuned[0] / "checkpoints" / "step-00000001")
    text = str(model.generate_model_card(repo_id="you/robust"))
    assert "has not been evaluated" in text and "accuracy" not in text


def test_no_path_of_this_machine_is_published(finetuned: tuple[Path, Classifier], tmp_path: Path) -> None:
    HubClassifier.from_run(finetuned[0]).save_pretrained(tmp_path / "robust")
    for path in (tmp_path / "robust").iterdir():
        assert b"/home/me" not in path.read_bytes(), path.name
        assert str(finetuned[0]).encode() not in path.read_bytes(), path.name


def test_an_upload_carries_the_same_files(
    finetuned: tuple[Path, Classifier], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the two calls that need the network are replaced."""
    from huggingface_hub import HfApi

    sent: dict[str, bytes] = {}
    created: dict[str, Any] = {}

    class Url(str):
        repo_id = "you/robust"

    def create_repo(self: HfApi, **options: Any) -> Url:
        created.update(options)
        return Url("https://huggingface.co/you/robust")

    def upload_folder(self: HfApi, *, folder_path: Path, **options: Any) -> str:
        sent.update({p.name: p.read_bytes() for p in Path(folder_path).iterdir()})
        return "uploaded"

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    publish(HubConfig(str(finetuned[0]), output=str(tmp_path / "robust"), repo_id="you/robust", private=True))
    assert created["repo_id"] == "you/robust" and created["private"] is True
    tensors = load(sent["model.safetensors"])
    assert all(torch.equal(tensors[name], tensor) for name, tensor in file_state(finetuned[1]).items())
    assert b'from_pretrained("you/robust")' in sent["README.md"]


def test_a_repository_in_the_cache(finetuned: tuple[Path, Classifier], tmp_path: Path) -> None:
    """As the Hub's own client lays out what it has downloaded."""
    snapshot = tmp_path / "models--you--robust" / "snapshots" / "0123"
    HubClassifier.from_run(finetuned[0]).save_pretrained(snapshot)
    (tmp_path / "models--you--robust" / "refs").mkdir()
    (tmp_path / "models--you--robust" / "refs" / "main").write_text("0123")
    model = HubClassifier.from_pretrained("you/robust", cache_dir=tmp_path, local_files_only=True)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(model(images), finetuned[1](images))


def test_timm_weights_both_ways(tmp_path: Path) -> None:
    """A model of timm, published as ours, exported to timm: the same logits all along."""
    vit = pytest.importorskip("timm.models.vision_transformer")
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3, "num_classes": 5,
                 "global_pool": "avg"}  # fmt: skip
    theirs = vit.VisionTransformer(**arguments).eval()
    save_file(theirs.state_dict(), tmp_path / "timm.safetensors")
    HubClassifier.from_run(tmp_path / "timm.safetensors").save_pretrained(tmp_path / "ours")
    images = torch.rand(2, 3, 32, 32)
    ours = HubClassifier.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)
    exported = export(ExportConfig(str(tmp_path / "ours" / "model.safetensors"), str(tmp_path / "back.safetensors")))
    back = vit.VisionTransformer(**arguments).eval()
    back.load_state_dict(load_file(exported))
    assert torch.equal(back(images), theirs(images))


def test_refuses(pretrained: tuple[Path, MaskedModel], tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no classification head"):
        HubClassifier.from_run(pretrained[0])
    with pytest.raises(FileNotFoundError, match=r"holds no results\.json"):
        HubMaskedModel.from_run(pretrained[0], results=tmp_path)
    with pytest.raises(ValueError, match="--output hub/NAME"):
        HubConfig("runs/x")


def test_nobody_else_s_files_are_replaced(finetuned: tuple[Path, Classifier], tmp_path: Path) -> None:
    """`--output RUN` would have replaced the run's config.json, and a folder of notes its README.md."""
    run, _ = finetuned
    (run / "config.json").write_text(json.dumps({"format": "mimir_fast.run", **CONFIG}))
    with pytest.raises(FileExistsError, match=r"is the folder of a run and has config.json: choose another --output"):
        publish(HubConfig(str(run), output=str(run)))
    assert json.loads((run / "config.json").read_text())["init"] == CONFIG["init"]
    for folder in (checkpoints_of(run)[-1], run / "checkpoints"):  # what lies beside its tensors is read with them
        before = sorted(path.name for path in folder.iterdir())
        with pytest.raises(FileExistsError, match="which another file would damage: choose another --output"):
            publish(HubConfig(str(run), output=str(folder)))
        assert sorted(path.name for path in folder.iterdir()) == before
    (tmp_path / "README.md").write_text("# My notes")
    with pytest.raises(FileExistsError, match=r"was not written by this command and has README.md"):
        HubClassifier.from_run(run).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
