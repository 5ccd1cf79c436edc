"""Weights from every writer, hostile and damaged files, and what the report says."""

import argparse
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from file_state import file_state
from safetensors.torch import save_file
from small_models import masked_vit

from mimir_fast.checkpoints.saving import save_checkpoint
from mimir_fast.models.classifier import Classifier, ClassifierConfig, build_classifier, load_classifier
from mimir_fast.models.file_names import parameters_by_file_name
from mimir_fast.models.loading import initialize, resize_positions
from mimir_fast.models.masked_model import MaskedModel
from mimir_fast.models.weight_files import WeightsError, read_weights


def autoencoder(**options: Any) -> MaskedModel:
    torch.manual_seed(3)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 192, "depth": 12, "num_heads": 3}
    return masked_vit(**(sizes | options))


def classifier(num_classes: int = 10, image_size: int = 32, patch_size: int = 8, **options: Any) -> Classifier:
    torch.manual_seed(4)
    return build_classifier(ClassifierConfig(encoder="tiny", patch_size=patch_size, **options), image_size, num_classes)


def authors_file(path: Path, model: torch.nn.Module) -> Path:
    """What the authors' script writes."""
    args = argparse.Namespace(model="mae_vit_tiny", lr=None, output_dir=Path("/tmp/out"), blr=1.5e-4)
    torch.save(
        {"model": model.state_dict(), "optimizer": {"state": {}}, "epoch": 799, "scaler": {}, "args": args}, path
    )
    return path


def checkpoint_folder(run: Path, model: torch.nn.Module, *, ema: float | None = None, **meta: Any) -> Path:
    """A checkpoint as the training loop writes it; its moving average holds `ema` everywhere."""
    tensors = {f"model/{n}": t.detach() for n, t in file_state(model).items()}
    if ema is not None:
        tensors |= {f"ema/{n}": torch.full_like(p, ema) for n, p in parameters_by_file_name(model) if p.requires_grad}
    tensors["optimizer/blocks.0.norm1.weight/exp_avg"] = torch.zeros(192)
    folder = run / "checkpoints" / "step-00000007"
    save_checkpoint(folder, tensors, {"step": 7, **meta})
    return folder


def assert_encoder_equal(model: Classifier, source: torch.nn.Module) -> None:
    own, theirs = file_state(model), file_state(source)
    for name in own:
        if not name.startswith(("head", "fc_norm")):
            assert torch.equal(own[name], theirs[name]), name


class TestInitialize:
    def test_from_the_authors_file(self, tmp_path: Path) -> None:
        source, model = autoencoder(), classifier()
        report = initialize(model, authors_file(tmp_path / "checkpoint-799.pth", source))
        assert_encoder_equal(model, source)
        assert report.fresh == ["fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"]
        text = str(report)
        assert "loaded   148 tensors" in text and "decoder_blocks.* (24)" in text and "head.weight" in text

    @pytest.mark.parametrize("where", ["run", "checkpoint"])
    def test_from_our_run(self, tmp_path: Path, where: str) -> None:
        source, model = autoencoder(), classifier()
        folder = checkpoint_folder(tmp_path, source)
        report = initialize(model, tmp_path if where == "run" else folder)
        assert_encoder_equal(model, source)
        assert "weights of step 7" in report.origin

    def test_the_moving_average_is_preferred_and_can_be_refused(self, tmp_path: Path) -> None:
        source, model = autoencoder(), classifier()
        checkpoint_folder(tmp_path, source, ema=0.25)
        report = initialize(model, tmp_path)
        assert (model.encoder.blocks[3].mlp.fc1.weight == 0.25).all() and "moving average" in report.origin
        assert torch.equal(model.encoder.pos_embed, source.encoder.pos_embed)  # fixed, so not averaged
        initialize(model, tmp_path, "model")
        assert_encoder_equal(model, source)

    def test_asking_for_an_average_that_is_not_there(self, tmp_path: Path) -> None:
        checkpoint_folder(tmp_path, autoencoder())
        with pytest.raises(WeightsError, match="holds no moving average"):
            initialize(classifier(), tmp_path, "ema")

    def test_from_a_timm_state_dict(self, tmp_path: Path) -> None:
        timm_vit = pytest.importorskip("timm.models.vision_transformer")
        source = timm_vit.VisionTransformer(img_size=32, patch_size=8, embed_dim=192, num_heads=3, num_classes=1000)
        save_file(file_state(source), tmp_path / "timm.safetensors")
        model = classifier()
        report = initialize(model, tmp_path / "timm.safetensors")
        assert_encoder_equal(model, source)
        assert set(report.skipped) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
        assert "the head had 1,000 classes, the model has 10: it starts fresh" in str(report)

    def test_positions_are_resized_to_the_grid(self, tmp_path: Path) -> None:
        source, model = autoencoder(), classifier(image_size=64)
        report = initialize(model, authors_file(tmp_path / "a.pth", source))
        assert report.resized == ["pos_embed (1, 17, 192) -> (1, 65, 192)"]
        assert torch.equal(model.encoder.pos_embed[:, 0], source.encoder.pos_embed[:, 0])
        # Twice the resolution: the mean over each 2 x 2 group is near the old row.
        grouped = model.encoder.pos_embed[0, 1:].view(4, 2, 4, 2, 192).mean(dim=(1, 3)).flatten(0, 1)
        assert (grouped - source.encoder.pos_embed[0, 1:]).abs().mean() < 0.05

    def test_resizing_to_the_same_grid_is_the_identity(self) -> None:
        positions = torch.randn(1, 17, 8)
        torch.testing.assert_close(resize_positions(positions, 17), positions)


@pytest.mark.parametrize("prefix", ["module.base_model.", "module.", "_orig_mod.", ""])
def test_prefixes_of_released_models(tmp_path: Path, prefix: str) -> None:
    source = classifier()
    state = {prefix + n: t for n, t in file_state(source).items()} | {"module.normalize.mean": torch.zeros(3)}
    torch.save({"model_state_dict": state} if prefix == "module.base_model." else state, tmp_path / "robust.pth")
    if prefix in ("module.", ""):
        state.pop("module.normalize.mean")
        torch.save(state, tmp_path / "robust.pth")
    loaded = load_classifier(tmp_path / "robust.pth", num_classes=10)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded(images), source.eval()(images))


class TestLoadClassifier:
    def test_configuration_comes_back(self, tmp_path: Path) -> None:
        source = classifier(normalization="half", token_keep_rate=0.9)
        config = {"model": {"normalization": "half", "token_keep_rate": 0.9, "drop_path": 0.1}, "data": {}}
        loaded = load_classifier(checkpoint_folder(tmp_path, source, config=config))
        assert loaded.config == source.config and not loaded.training
        images = torch.rand(2, 3, 32, 32)
        assert torch.equal(loaded(images), source.eval()(images))

    def test_the_best_checkpoint_is_preferred(self, tmp_path: Path) -> None:
        checkpoint_folder(tmp_path, classifier())
        best = classifier()
        torch.nn.init.ones_(best.head.bias)
        tensors = {f"model/{n}": t.detach() for n, t in file_state(best).items()}
        save_checkpoint(tmp_path / "checkpoints" / "best", tensors, {"step": 3})
        assert (load_classifier(tmp_path).head.bias == 1).all()

    def test_a_checkpoint_without_a_head(self, tmp_path: Path) -> None:
        checkpoint_folder(tmp_path, autoencoder())
        with pytest.raises(WeightsError, match=r"no classification head.*mimir_fast.finetune"):
            load_classifier(tmp_path)

    def test_class_count_mismatch(self, tmp_path: Path) -> None:
        checkpoint_folder(tmp_path, classifier(num_classes=200))
        with pytest.raises(WeightsError, match="has 200 classes, the data has 10"):
            load_classifier(tmp_path, num_classes=10)


class TestBadFiles:
    def test_a_hostile_pickle_is_refused_and_does_not_run(self, tmp_path: Path) -> None:
        class Hostile:
            def __reduce__(self) -> tuple[Any, ...]:
                return os.mkdir, (str(tmp_path / "it_ran"),)

        with (tmp_path / "raw.pth").open("wb") as file:
            pickle.dump({"model": Hostile()}, file)
        torch.save({"model": Hostile()}, tmp_path / "zip.pth")
        for name in ("raw.pth", "zip.pth"):
            with pytest.raises(WeightsError, match="could run code"):
                read_weights(tmp_path / name)
        assert not (tmp_path / "it_ran").exists()

    def test_truncated_files(self, tmp_path: Path) -> None:
        torch.save(file_state(classifier()), tmp_path / "a.pth")
        save_file(file_state(classifier()), tmp_path / "a.safetensors")
        for name in ("a.pth", "a.safetensors"):
            whole = (tmp_path / name).read_bytes()
            (tmp_path / name).write_bytes(whole[: len(whole) // 2])
            with pytest.raises(WeightsError, match=r"truncated|no whole safetensors|unpickling"):
                read_weights(tmp_path / name)

    def test_a_truncated_checkpoint(self, tmp_path: Path) -> None:
        folder = checkpoint_folder(tmp_path, classifier())
        shard = next(folder.glob("*.safetensors"))
        shard.write_bytes(shard.read_bytes()[:-100])
        with pytest.raises(WeightsError, match="truncated"):
            read_weights(folder)

    def test_something_else(self, tmp_path: Path) -> None:
        torch.save({"model": {"conv1.weight": torch.zeros(1)}}, tmp_path / "resnet.pth")
        with pytest.raises(WeightsError, match=r"no vision transformer.*conv1.weight"):
            read_weights(tmp_path / "resnet.pth")
        with pytest.raises(WeightsError, match="does not exist; wanted a run"):
            read_weights(tmp_path / "nowhere.pth")
        with pytest.raises(WeightsError, match="no checkpoint in"):
            read_weights(tmp_path)

    @pytest.mark.parametrize(
        ("options", "fix"),
        [
            ({"embed_dim": 384, "num_heads": 6}, "--model.encoder small"),
            ({"in_chans": 1}, "--data.channels 1"),
            ({"depth": 5}, "--model.options depth=5"),
        ],
    )
    def test_another_architecture(self, tmp_path: Path, options: dict[str, Any], fix: str) -> None:
        path = authors_file(tmp_path / "a.pth", autoencoder(**options))
        with pytest.raises(WeightsError, match="another architecture") as error:
            initialize(classifier(), path)
        assert fix in str(error.value)

    def test_an_incomplete_file(self, tmp_path: Path) -> None:
        state = file_state(autoencoder())
        del state["blocks.4.attn.qkv.weight"]
        save_file(state, tmp_path / "a.safetensors")
        with pytest.raises(WeightsError, match=r"incomplete.*blocks\.4\.attn\.qkv\.weight"):
            initialize(classifier(), tmp_path / "a.safetensors")
