"""Random masks: a partition of the patches, the same wherever and however it is drawn."""

import pytest
import torch

from mimir_fast import _native, random_masks
from mimir_fast.ops.random_masks import masks_from_noise, random_masks_reference
from mimir_fast.philox import Stream

SHAPES = [(8, 196, 49), (1, 1, 1), (3, 7, 7), (2, 65, 1), (2, 1000, 251), (0, 16, 4)]  # B, N, K
ORDERS = ["sorted", "shuffled"]


def samples_of(B: int, device: torch.device | str = "cpu") -> torch.Tensor:
    return 10 * torch.arange(B, device=device) + 3


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 5000, 1250)], ids=str)
def test_matches_definition(shape, order, device):
    B, N, K = shape
    samples = samples_of(B, device)
    masks = random_masks(samples, N, K, seed=2**63 + 1, step=12, order=order)
    expected = random_masks_reference(samples, N, K, 2**63 + 1, 12, 0, order)
    assert all(torch.equal(a, b) for a, b in zip(masks, expected, strict=True))


@pytest.mark.parametrize("order", ORDERS)
def test_is_a_partition(order):
    keep, masked = random_masks(samples_of(50), 196, 49, seed=0, step=0, order=order)
    assert torch.equal(torch.cat([keep, masked], 1).sort().values, torch.arange(196).expand(50, -1))
    assert (masked.diff() > 0).all()
    assert bool((keep.diff() > 0).all()) == (order == "sorted")


def test_every_patch_is_kept_equally_often():
    keep, _ = random_masks(torch.arange(4000), 64, 16, seed=0, step=0)
    counts = keep.flatten().bincount(minlength=64)
    assert (counts - 1000).abs().max() < 5 * (4000 * 0.25 * 0.75) ** 0.5


def test_depends_on_sample_step_stream_and_seed_only():
    samples = samples_of(6)
    keep, _ = random_masks(samples, 196, 49, seed=1, step=2)
    part, _ = random_masks(samples[3:], 196, 49, seed=1, step=2)
    assert torch.equal(part, keep[3:])  # whatever the batch or the rank
    per_sample, _ = random_masks(samples, 196, 49, seed=1, step=torch.tensor([2, 2, 2, 3, 2, 2]))
    assert (per_sample == keep).all(1).tolist() == [True, True, True, False, True, True]
    for other in ({"seed": 2, "step": 2}, {"seed": 1, "step": 3}, {"seed": 1, "step": 2, "stream": Stream.ATTACK_MASK}):
        assert not (random_masks(samples, 196, 49, **other)[0] == keep).all(1).any()


def test_masks_from_noise_keeps_the_smallest():
    keep, masked = masks_from_noise(torch.tensor([[0.9, 0.1, 0.5, 0.3]]), 2)
    assert keep.tolist() == [[1, 3]] and masked.tolist() == [[0, 2]]
    assert masks_from_noise(torch.tensor([[0.9, 0.3, 0.5, 0.1]]), 2, "sorted")[0].tolist() == [[1, 3]]


def test_same_without_the_native_kernel(monkeypatch):
    with_kernel = random_masks(samples_of(4), 50, 13, seed=9, step=1)
    monkeypatch.setattr(_native, "has", lambda function: False)
    without = random_masks(samples_of(4), 50, 13, seed=9, step=1)
    assert all(torch.equal(a, b) for a, b in zip(with_kernel, without, strict=True))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_kernel(shape, order, triton_device):
    from mimir_kernels import random_masks as kernels

    B, N, K = shape
    samples = samples_of(B, triton_device)
    masks = kernels.random_masks(samples, torch.full_like(samples, 12), N, K, -7, 1, order == "shuffled")
    expected = random_masks_reference(samples, N, K, -7, 12, 1, order)
    assert all(torch.equal(a, b) for a, b in zip(masks, expected, strict=True))


def test_registration(device):
    samples = samples_of(3, device)
    arguments = (samples, torch.zeros_like(samples), 10, 4, 1, 0)
    for shuffled in (False, True):
        torch.library.opcheck(torch.ops.mimir_fast.random_masks, (*arguments, shuffled))


def test_compiles_without_graph_break(device):
    samples = samples_of(3, device)
    compiled = torch.compile(
        lambda s, step: random_masks(s, 10, 4, seed=5, step=step), fullgraph=True, backend="aot_eager"
    )
    for step in range(3):
        expected = random_masks(samples, 10, 4, seed=5, step=step)
        assert all(torch.equal(a, b) for a, b in zip(compiled(samples, step), expected, strict=True))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.arange(2), 10, 0), ValueError, "1 <= num_keep"),
        ((torch.arange(2), 10, 11), ValueError, "got 11 and 10"),
        ((torch.arange(2), 70000, 11), ValueError, "65536"),
        ((torch.arange(2.0), 10, 4), TypeError, r"use samples_B.long\(\)"),
    ],
)
def test_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        random_masks(*arguments, seed=0, step=0)


def test_refuses_an_unknown_order():
    with pytest.raises(ValueError, match="'sorted'"):
        random_masks(torch.arange(2), 10, 4, seed=0, step=0, order="random")
