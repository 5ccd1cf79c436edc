"""Every attack in every float type, and in inference mode: it works, or says in a line what it wants."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mimir_fast.attacks.apgd import apgd
from mimir_fast.attacks.decision import hop_skip_jump
from mimir_fast.attacks.lp import LpThreat, attack_classifier
from mimir_fast.attacks.minimal import smallest_perturbation
from mimir_fast.attacks.momentum import momentum_ensemble
from mimir_fast.attacks.nearest import apgd_nearest
from mimir_fast.attacks.patch import patch
from mimir_fast.attacks.pgd import cross_entropy, pgd
from mimir_fast.attacks.rays import rays
from mimir_fast.attacks.recolor import recolor
from mimir_fast.attacks.square import square
from mimir_fast.attacks.threat_model import LinfThreat
from mimir_fast.attacks.unforeseen import elastic, jpeg, turn
from mimir_fast.attacks.until_broken import apgd_many, fab_many, pgd_many

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]
SEEDED = {"samples": torch.arange(6), "seed": 0}
LINF = LinfThreat(eps=0.03, alpha=0.01, num_steps=3)
HALF: dict[str, Attack] = {
    "pgd": lambda m, x, y: pgd(m, x, y, LINF),
    "pgd_l2": lambda m, x, y: attack_classifier(m, x, y, LpThreat(norm="l2", eps=0.5, alpha=0.1, num_steps=3)),
    "pgd_l1": lambda m, x, y: attack_classifier(m, x, y, LpThreat(norm="l1", eps=5.0, alpha=1.0, num_steps=3)),
    "pgd_many": lambda m, x, y: pgd_many(m, x, y, LINF),
    "apgd": lambda m, x, y: apgd(m, x, y, 0.03, 3),
    "apgd_many": lambda m, x, y: apgd_many(m, x, y, 0.3, 3, norm="l2"),
    "apgd_nearest": lambda m, x, y: apgd_nearest(m, x, y, 0.03, 10, losses=[cross_entropy]),
    "momentum": lambda m, x, y: momentum_ensemble([m], x, y, LINF),
    "turn": lambda m, x, y: turn(m, x, y, degrees=10, shift=0.1, num_angles=3, num_shifts=3),
}
FULL: dict[str, Attack] = {
    "fab": lambda m, x, y: fab_many(m, x, y, 0.03, 3),
    "fmn": lambda m, x, y: smallest_perturbation(m, x, y, norm="l2", num_steps=3)[0],
    "patch": lambda m, x, y: patch(m, x, y, side=3, num_steps=3),
    "recolor": lambda m, x, y: recolor(m, x, y, change=0.1, num_steps=3),
    "elastic": lambda m, x, y: elastic(m, x, y, pixels=1, num_steps=3, **SEEDED),  # type: ignore[arg-type]
    "jpeg": lambda m, x, y: jpeg(m, x, y, eps=0.03, num_steps=3, **SEEDED),  # type: ignore[arg-type]
}
NO_GRADIENT: dict[str, Attack] = {
    "square": lambda m, x, y: square(m, x, y, 0.03, 20),
    "hop_skip_jump": lambda m, x, y: hop_skip_jump(m, x, y, eps=0.03, norm="linf", queries=50),
    "hop_skip_jump_l2": lambda m, x, y: hop_skip_jump(m, x, y, eps=0.5, norm="l2", queries=50),
    "rays": lambda m, x, y: rays(m, x, y, eps=0.03, queries=30),
}
EVERY = HALF | FULL | NO_GRADIENT


def attacked(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(images, what the attack made of them), by a model of that type."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).requires_grad_(False)
    for weight in model.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator) / 5)
    images = torch.rand(6, 3, 8, 8, generator=generator).to(dtype)
    model = model.to(dtype)
    return images, EVERY[name](model, images, model(images).argmax(1))


@pytest.mark.parametrize("name", EVERY)
def test_doubles(name: str) -> None:
    images, found = attacked(name, torch.float64)
    assert found.dtype == torch.float64 and not torch.equal(found, images)


@pytest.mark.parametrize("name", EVERY)
def test_half_precision_where_it_holds_what_is_compared(name: str) -> None:
    if name in HALF:
        images, found = attacked(name, torch.bfloat16)
        assert found.dtype == torch.bfloat16 and not torch.equal(found, images)
    else:
        with pytest.raises(ValueError, match=r"got torch.bfloat16 images: give it images.float\(\)"):
            attacked(name, torch.bfloat16)


@pytest.mark.parametrize("name", EVERY)
def test_inference_mode(name: str) -> None:
    with torch.inference_mode():
        if name in NO_GRADIENT or name == "turn":
            attacked(name, torch.float32)
        else:
            with pytest.raises(RuntimeError, match=r"takes gradients, and torch.inference_mode\(\) allows none"):
                attacked(name, torch.float32)
