"""Running statistics of batch norms (XCiT's stem has them) are treated as the weights are."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mimir_fast.checkpoints.reading import saved_tensors
from mimir_fast.checkpoints.saving import save_checkpoint
from mimir_fast.models.classifier import ClassifierConfig, build_classifier
from mimir_fast.training.distributed import parallelize
from mimir_fast.training.ema import Ema
from mimir_fast.training.optimizer import OptimizerConfig, build_optimizer
from mimir_fast.training.state import load_training, training_tensors
from mimir_fast.training.statistics import StatisticsGuard, running_statistics
from mimir_fast.world import World


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return build_classifier(ClassifierConfig(family="xcit", encoder="nano", patch_size=4), 16, 10).train()


def images(seed: int = 0) -> Tensor:
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in running_statistics(model)}


def test_they_are_found_under_the_names_of_files(model: nn.Module) -> None:
    names = set(statistics(model))
    assert any(name.endswith("running_mean") for name in names) and not any(n.startswith("encoder.") for n in names)
    assert not statistics(build_classifier(ClassifierConfig(encoder="nano", patch_size=4), 16, 10))


def test_a_skipped_step_leaves_them(model: nn.Module) -> None:
    """One batch of NaN left NaN in the statistics of the run for ever, though its step was skipped."""
    guard, before = StatisticsGuard(model), statistics(model)
    guard.before_step()
    model(images() * torch.nan)
    assert any(buffer.isnan().any() for buffer in statistics(model).values())
    guard.after_step(torch.tensor(False))
    assert all(torch.equal(before[name], buffer) for name, buffer in statistics(model).items())
    guard.before_step()
    model(images())
    seen = statistics(model)
    guard.after_step(torch.tensor(True))
    assert all(torch.equal(seen[name], buffer) for name, buffer in statistics(model).items())
    assert not all(torch.equal(before[name], buffer) for name, buffer in seen.items())


def test_averaged_weights_have_averaged_statistics(model: nn.Module) -> None:
    before, ema = statistics(model), Ema(model, 0.75)
    model(images())
    after = statistics(model)
    ema.update()
    name = next(name for name in before if name.endswith("running_mean"))
    expected = 0.75 * before[name] + 0.25 * after[name]
    torch.testing.assert_close(ema.average[name], expected)
    with ema.swapped():
        torch.testing.assert_close(statistics(model)[name], expected)
    assert torch.equal(statistics(model)[name], after[name])


def test_a_checkpoint_from_before_they_were_averaged(model: nn.Module, tmp_path: Path) -> None:
    optimizer = build_optimizer(model, OptimizerConfig())
    model(images())
    tensors = training_tensors(model, optimizer, Ema(model, 0.75))
    old = {name: t for name, t in tensors.items() if not (name.startswith("ema/") and "running" in name)}
    assert len(old) < len(tensors)
    save_checkpoint(tmp_path / "step-00000001", old, {"step": 1})
    assert set(saved_tensors(tmp_path / "step-00000001")) == set(old)
    saved = statistics(model)
    model(images(1))
    ema = Ema(model, 0.75)
    load_training(tmp_path / "step-00000001", model, optimizer, ema)
    for name, buffer in saved.items():
        assert torch.equal(statistics(model)[name], buffer)
        if buffer.is_floating_point():
            assert torch.equal(ema.average[name], buffer)


def test_recomputing_counts_a_batch_once(model: nn.Module) -> None:
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = build_classifier(ClassifierConfig(family="xcit", encoder="nano", patch_size=4), 16, 10).train()
        world = World(0, 1, torch.device("cpu"))
        run = parallelize(model, "single", world, bf16=False, compiled=False, checkpoint_activations=recompute)
        run(images()).square().sum().backward()
        results.append((statistics(model), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    (plain, gradients), (again, gradients_again) = results
    assert all(torch.equal(plain[name], buffer) for name, buffer in again.items())
    torch.testing.assert_close(gradients, gradients_again)
