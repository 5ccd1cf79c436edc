"""Smallest perturbations: against closed forms, and against the authors' FAB."""

from typing import Any

import pytest
import torch
from small_classifier import DIGITS, SmallNet
from torch import Tensor, nn

from mimir_fast.attacks.lp import size_of
from mimir_fast.attacks.minimal import DUAL, Norm, smallest_perturbation
from mimir_fast.data import build_loader
from mimir_fast.layers.borrowing import borrowed

NORMS: list[Norm] = ["linf", "l2", "l1"]


class Linear(nn.Module):
    """Two classes; the margin is w·(x − 1/2)."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(0.3 * torch.randn(3 * 12 * 10, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        value = (x.flatten(1) - 0.5) @ self.w
        return torch.stack([value, -value], dim=1) / 2


@pytest.mark.parametrize("norm", NORMS)
def test_distances_of_a_linear_model_are_the_closed_form(norm: Norm) -> None:
    model = Linear()
    # Grey images near the border: the box [0, 1] is out of reach.
    images = 0.5 + 0.02 * torch.randn(9, 3, 12, 10, generator=torch.Generator().manual_seed(1))
    value = (images.flatten(1) - 0.5) @ model.w.detach()
    labels = (value < 0).long()
    true = value.abs() / size_of(model.w.detach()[None], DUAL[norm])
    x = smallest_perturbation(model, images, labels, norm)
    assert (model(x).argmax(dim=1) != labels).all() and x.min() >= 0 and x.max() <= 1
    ratio = size_of(x - images, norm) / true
    assert ratio.min() > 1 - 1e-4 and ratio.max() < 1.03

    alone = torch.cat([smallest_perturbation(model, images[i : i + 1], labels[i : i + 1], norm) for i in (0, 5)])
    torch.testing.assert_close(size_of(alone - images[[0, 5]], norm) / true[[0, 5]], ratio[[0, 5]], rtol=0.01, atol=0)


def test_bisection_alone_comes_near_and_fmn_nearer() -> None:
    model, images = Linear(), torch.full((1, 3, 12, 10), 0.5)
    images[0, 0, 0, 0] = 0.6
    labels = model(images).argmax(dim=1)
    true = float(0.1 * model.w.detach()[0].abs() / model.w.detach().abs().sum())
    sizes = {
        rounds: float(
            size_of(smallest_perturbation(model, images, labels, "linf", num_steps=0, rounds=rounds) - images, "linf")
        )
        for rounds in (8, 16)
    }
    fmn = smallest_perturbation(model, images, labels, "linf", rounds=0)
    assert true * (1 - 1e-3) < float(size_of(fmn - images, "linf")) < 1.05 * true
    assert true * (1 - 1e-3) < sizes[16] < 1.1 * true and sizes[16] <= sizes[8] <= 2.0**-8 + 1e-6


def test_what_is_wrong_already_stays_and_so_does_what_nothing_breaks() -> None:
    model, images = Linear(), torch.rand(4, 3, 12, 10, generator=torch.Generator().manual_seed(2))
    wrong = 1 - model(images).argmax(dim=1)
    assert torch.equal(smallest_perturbation(model, images, wrong, "l2"), images)

    class Constant(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 0 * super().forward(x) + torch.tensor([1.0, 0.0])

    labels = torch.zeros(4, dtype=torch.long)
    for norm in NORMS:
        kept = smallest_perturbation(Constant(), images, labels, norm, num_steps=3, rounds=2, pgd_steps=2)
        assert torch.equal(kept, images)


@pytest.mark.parametrize("norm", ["linf", *(pytest.param(n, marks=pytest.mark.slow) for n in ("l2", "l1"))])
def test_the_median_is_that_of_fab_or_smaller(norm: Norm, small_model: SmallNet) -> None:
    fab: Any = pytest.importorskip("pyautoattack.fab_pt").FABAttack_PT
    batch = next(iter(build_loader(DIGITS, split="test", batch_size=40)))
    images, labels = batch.images.float() / 255, batch.labels
    right = small_model(images).argmax(dim=1) == labels
    images, labels = images[right], labels[right]
    radius, name = {"linf": (0.3, "Linf"), "l2": (2.0, "L2"), "l1": (12.0, "L1")}[norm]
    with borrowed(small_model, "eval") as module:  # it calls backward(), which fills the weights' gradients
        attack = fab(module, norm=name, n_restarts=1, n_iter=100, eps=radius, device="cpu")
        theirs = attack.perturb(images.clone(), labels.clone())
    ours = smallest_perturbation(small_model, images, labels, norm)
    sizes = []
    for x in (ours, theirs):
        broken = small_model(x).argmax(dim=1) != labels
        sizes.append(size_of(x - images, norm).masked_fill(~broken, torch.inf))
    medians = [float(size.quantile(0.5)) for size in sizes]
    assert 0 < medians[0] <= 1.05 * medians[1] < float("inf")
    assert (sizes[0] / sizes[1]).median() < 1.02, "image by image"
