"""LGV: the models that SGD passes, equal to torchattacks', and attacked in turn."""

import copy

import pytest
import torch
from small_classifier import DIGITS, EPS
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mimir_fast.attacks.lgv import collect, visits
from mimir_fast.attacks.momentum import momentum_ensemble
from mimir_fast.data import build_loader
from mimir_fast.evaluation.attacks import make_threat
from mimir_fast.evaluation.images import EvaluationImages

Batches = list[tuple[Tensor, Tensor]]


def batches(count: int, size: int = 64) -> Batches:
    stream = iter(build_loader(DIGITS, split="train", batch_size=size, seed=0, augment=False))
    return [(batch.images.float() / 255, batch.labels) for _, batch in zip(range(count), stream, strict=False)]


@pytest.fixture(scope="module")
def digits(digits_images: EvaluationImages) -> tuple[Tensor, Tensor]:
    part = digits_images.evenly(32)
    return part.images.float() / 255, part.labels


def test_equals_torchattacks(small_model: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    """Weights and running statistics bit by bit; images, made by I-FGSM on one model a step, but for rounding."""
    torchattacks = pytest.importorskip("torchattacks")
    from torchattacks.wrappers.lgv import LightEnsemble

    two = batches(2)
    ours = collect(small_model, two * 3, count=3, every=2)
    theirs = torchattacks.LGV(
        small_model, DataLoader(TensorDataset(*map(torch.cat, zip(*two * 3, strict=True))), 64), epochs=1,
        nb_models_epoch=3, verbose=False,
    )  # fmt: skip
    theirs.collect_models()  # it begins its loader anew for each model: with the same two batches
    for one, other in zip(ours, theirs.list_models, strict=True):
        pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    images, labels = digits
    ensemble = LightEnsemble([copy.deepcopy(ours[number]) for number in visits(3)], order=None).eval()
    wanted = torchattacks.BIM(ensemble, eps=EPS, alpha=EPS / 10, steps=5)(images, labels)
    threat = make_threat("linf", EPS, 5, EPS / 10)
    found = momentum_ensemble(ours, images, labels, threat, decay=0.0, together=1)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    at_once = momentum_ensemble(ours, images, labels, threat, decay=0.0)
    assert (at_once - wanted).abs().max() > 1e-3, "all models together make other images"


def test_the_model_is_left_alone_and_its_copies_differ(small_model: nn.Module) -> None:
    model = copy.deepcopy(small_model).requires_grad_(False)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with torch.no_grad():  # as where an evaluation collects them
        found = collect(model, batches(4), count=2, every=2)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and not any(p.requires_grad for p in model.parameters())
    assert not any(m.training for each in found for m in each.modules())
    weights = [each.head.weight for each in (model, *found)]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    assert visits(5) == visits(5) != visits(5, seed=1) and sorted(visits(5)) == list(range(5))


def test_it_says_what_cannot_be_collected(small_model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"not finite.*learning rate 1e\+20"):
        collect(small_model, batches(2), count=1, every=2, lr=1e20)
    with pytest.raises(ValueError, match="no weights to train"):
        collect(nn.Flatten(), batches(1), count=1, every=1)
