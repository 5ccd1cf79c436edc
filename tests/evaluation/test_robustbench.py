"""What we export is a model in RobustBench's sense: images in [0, 1] in, logits out, judged by its own functions."""

from pathlib import Path

import pytest
import torch
from file_state import file_state

from mimir_fast.checkpoints.saving import save_checkpoint
from mimir_fast.data import DataConfig
from mimir_fast.evaluation.attacks import natural
from mimir_fast.evaluation.images import load_images
from mimir_fast.evaluation.measure import ShardRun, measure, scored
from mimir_fast.export import ExportConfig, export
from mimir_fast.models.classifier import ClassifierConfig, build_classifier, load_classifier


def test_its_clean_accuracy_is_ours(tmp_path: Path) -> None:
    """A network fitted for a moment, so that some digits are right and some wrong."""
    utils = pytest.importorskip("robustbench.utils", reason="RobustBench pins old packages: it is installed aside")
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = build_classifier(ClassifierConfig(encoder="nano", patch_size=16, normalization="half"), 32, 10)
    images = load_images(DataConfig(source="digits", image_size=32, channels=3))
    x, y = images.images.float() / 255, images.labels
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(12):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x[:64]), y[:64]).backward()
        optimizer.step()
    tensors = {f"model/{n}": t.detach() for n, t in file_state(model).items()}
    meta = {"step": 1, "config": {"model": {"normalization": "half"}}}
    save_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000001", tensors, meta)
    path = export(ExportConfig(str(tmp_path / "run"), str(tmp_path / "m.safetensors"), format="safetensors"))
    exported = load_classifier(path)
    theirs = utils.clean_accuracy(exported, x, y, batch_size=77, device=torch.device("cpu"))
    ours = measure(scored(natural().run), exported, images, ShardRun(100, torch.device("cpu"))).tensor("correct")
    assert theirs == pytest.approx(float(ours.mean())) and 0.1 < theirs < 1
