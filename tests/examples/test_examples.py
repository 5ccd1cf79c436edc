"""Every example runs as it is, and does what its text says."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_has_a_test() -> None:
    tests = globals()
    assert all(f"test_{path.stem}" in tests for path in EXAMPLES.glob("*.py"))


def test_ssl_hsic() -> None:
    """Features learned without labels tell digits apart better than an untrained network's."""
    found = load("ssl_hsic").main(num_steps=80, batch_size=96)
    assert found["after"] > found["before"] + 0.1


def test_timm_adversarial_training() -> None:
    """Adversarial training is what makes the difference under attack."""
    module = load("timm_adversarial_training")
    robust, natural = module.main(num_steps=60), module.main(num_steps=60, adversarial=False)
    assert robust["natural"] > 0.6 and natural["natural"] > 0.6
    assert robust["robust"] > natural["robust"] + 0.15


def test_the_attack_stays_in_the_ball_and_leaves_no_gradient() -> None:
    module = load("timm_adversarial_training")
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    images = torch.rand(4, 1, 8, 8)
    found = module.pgd(model, images, torch.arange(4), num_steps=3)
    assert (
        float((found - images).abs().max()) <= module.EPS + 1e-6 and 0 <= float(found.min()) <= float(found.max()) <= 1
    )
    assert all(parameter.grad is None for parameter in model.parameters())


def test_independence() -> None:
    p_values = load("independence").main(num_permutations=199)
    dependent = ("pixels, device", "pixels, label", "cos, sin of an angle")
    assert all(p_values[name] == pytest.approx(1 / 200) for name in dependent)
    assert all(p_values[name] > 0.01 for name in ("label, device", "pixels normalised per image, device"))


def test_lightning_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the bare loop; with lightning installed, by its Trainer as well."""
    module = load("lightning_module")
    if module.Trainer is not None:
        found = module.main(num_epochs=4)
        assert found["natural"] > 0.6 and found["robust"] > 0.3
        monkeypatch.setitem(__import__("sys").modules, "lightning", None)
        module = load("lightning_module")
    assert module.Trainer is None
    found = module.main(num_epochs=4)
    assert found["natural"] > 0.6 and found["robust"] > 0.3
