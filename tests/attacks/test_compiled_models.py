"""Attacks on a compiled classifier: same result, and its graph is not mistaken for the training graph."""

import pytest
import torch

from mimir_fast.attacks.pgd import pgd
from mimir_fast.attacks.threat_model import LinfThreat
from mimir_fast.layers import borrowing
from mimir_fast.models.classifier import ClassifierConfig, build_classifier
from mimir_fast.training.compile import compile_modules


def test_every_weight_still_gets_its_gradient() -> None:
    """torch 2.11 does not guard on requires_grad of weights: without the blocks' help none would get a gradient."""
    torch.manual_seed(0)
    model = build_classifier(ClassifierConfig(encoder="tiny", patch_size=16), image_size=32, num_classes=10)
    model.encoder.blocks = model.encoder.blocks[:1]
    torch.nn.init.normal_(model.head.weight, std=0.1)
    images, labels = torch.rand(4, 3, 32, 32), torch.arange(4)
    threat = LinfThreat(eps=8 / 255, alpha=2 / 255, num_steps=2)
    samples = torch.arange(4)
    eager = pgd(model, images, labels, threat, samples=samples)
    for block in model.layers():
        block.compile(backend="aot_eager")
    for _ in range(2):  # the second time all graphs are there
        adversarial = pgd(model, images, labels, threat, samples=samples)
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(adversarial), labels).backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert (adversarial - eager).abs().gt(1e-6).float().mean() < 0.01


@pytest.mark.parametrize("guards", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_compiled_weights_are_frozen_where_that_is_noticed(
    monkeypatch: pytest.MonkeyPatch, guards: bool, whole: bool
) -> None:
    """Not on torch 2.11, but for a model that `compile_modules` compiled as a whole, which says it itself."""
    monkeypatch.setattr(borrowing, "GUARDS_FROZEN", guards)
    model: torch.nn.Module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    if whole:
        model = torch.compile(model, backend="eager")
    else:
        model[0].compile(backend="eager")  # type: ignore[index, operator]
        compile_modules([model[1]], backend="eager")  # type: ignore[index, list-item]
    with borrowing.borrowed(model):
        frozen = [not p.requires_grad for p in model.parameters()]
    assert frozen == ([guards] * 6 if whole else [guards] * 4 + [True] * 2)
    assert all(p.requires_grad for p in model.parameters())
