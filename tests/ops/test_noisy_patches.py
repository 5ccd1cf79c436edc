"""Patches and the random start around them: the patches of `patchify_gather` and the noise of `random_uniform`."""

import pytest
import torch
from small_images import CASES, LAYOUTS, ids_of, images_of

from mimir_fast import _native
from mimir_fast.ops.noisy_patches import noisy_patches, noisy_patches_reference, only_noisy_patches
from mimir_fast.ops.patches import patchify_gather
from mimir_fast.ops.random_uniform import random_uniform
from mimir_fast.philox import Stream

SEED, EPS = 2**63 + 5, 8 / 255
ODD = [*CASES, (3, 1, 15, 10, 5, 6), (2, 2, 9, 9, 3, 9)]  # patches of 25 and 18 numbers: Philox blocks cross them


def samples_of(case: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(case[0]) * 1000 + 2**33


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", ODD, ids=str)
def test_matches_definition(case, dtype, layout, device):
    images, ids, samples = (t.to(device) for t in (images_of(case, dtype, layout), ids_of(case), samples_of(case)))
    ours = noisy_patches(images, ids, case[4], samples, seed=SEED, step=3, eps=EPS)
    wanted = noisy_patches_reference(images, ids, case[4], samples, SEED, 3, EPS)
    for a, b in zip(ours, wanted, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    alone = only_noisy_patches(images, ids, case[4], samples, seed=SEED, step=3, eps=EPS)
    assert alone.dtype == wanted[1].dtype and torch.equal(alone, wanted[1])


@pytest.mark.parametrize("case", ODD, ids=str)
def test_is_what_its_parts_give(case, device):
    """Bit for bit what was three ops before it: the numbers of a run do not change."""
    images, ids, samples = (t.to(device) for t in (images_of(case), ids_of(case), samples_of(case)))
    clean, noisy = noisy_patches(images, ids, case[4], samples, seed=SEED, step=3, eps=EPS)
    assert torch.equal(clean, patchify_gather(images, ids, case[4]))
    num = clean.shape[1] * clean.shape[2]
    draws = random_uniform(SEED, Stream.ATTACK_START, 3, samples, num)
    assert torch.equal(noisy, (clean + (2 * draws - 1).mul_(EPS).view(clean.shape)).clamp_(0, 1))


def test_is_a_function_of_sample_and_step():
    case = CASES[1]
    images, ids, samples = images_of(case), ids_of(case), samples_of(case)
    _, whole = noisy_patches(images, ids, 2, samples, seed=0, step=torch.tensor([4, 5, 6]), eps=EPS)
    for row, step in enumerate((4, 5, 6)):
        alone = slice(row, row + 1)
        _, noisy = noisy_patches(images[alone], ids[alone], 2, samples[alone], seed=0, step=step, eps=EPS)
        assert torch.equal(noisy, whole[alone])
        _, other = noisy_patches(images[alone], ids[alone], 2, samples[alone], seed=0, step=step + 9, eps=EPS)
        assert not torch.equal(noisy, other)


def test_any_number_of_threads_and_no_kernel_give_the_same_bits(monkeypatch):
    case, before = CASES[0], torch.get_num_threads()
    arguments = images_of(case), ids_of(case), 16, samples_of(case)
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(noisy_patches(*arguments, seed=1, step=0, eps=EPS))
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(_native, "has", lambda function: False)
    results.append(noisy_patches(*arguments, seed=1, step=0, eps=EPS))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("case", [(1, 3, 32, 48, 16, 5), *ODD[1:]], ids=str)
def test_triton_kernel(case, dtype, triton_device):
    from mimir_kernels import noisy_patches as kernels

    images, ids = images_of(case, dtype, "channels_last").to(triton_device), ids_of(case).contiguous().to(triton_device)
    samples = samples_of(case).to(triton_device)
    wanted = noisy_patches_reference(images, ids, case[4], samples, 7, 3, EPS)
    found = [torch.full_like(t, torch.nan) for t in wanted]
    steps = torch.full_like(samples, 3)
    kernels.noisy_patches(images, ids, samples, steps, *found, case[4], 7, int(Stream.ATTACK_START), EPS)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    alone = torch.full_like(wanted[1], torch.nan)
    kernels.noisy_patches(images, ids, samples, steps, None, alone, case[4], 7, int(Stream.ATTACK_START), EPS)
    assert torch.equal(alone, wanted[1])


def test_triton_reads_nothing_for_a_wrong_id(triton_device):
    from mimir_kernels import noisy_patches as kernels

    images = torch.full((1, 3, 4, 4), 255, dtype=torch.uint8, device=triton_device)
    ids = torch.tensor([[3, -1, 4, 2**40]], device=triton_device)
    clean, noisy = (torch.full((1, 4, 12), torch.nan, device=triton_device) for _ in range(2))
    zero = torch.zeros(1, dtype=torch.int64, device=triton_device)
    kernels.noisy_patches(images, ids, zero, zero, clean, noisy, 2, 0, 2, EPS)
    assert clean[:, 0].eq(1).all() and not clean[:, 1:].any() and noisy[:, 1:].max() <= EPS


def test_registration(device):
    case = (2, 3, 8, 12, 4, 3)
    images, ids, samples = (t.to(device) for t in (images_of(case), ids_of(case), samples_of(case)))
    for with_clean in (True, False):
        arguments = (images, ids, samples, torch.zeros_like(samples), 4, 1, 2, EPS, with_clean)
        torch.library.opcheck(torch.ops.mimir_fast.noisy_patches, arguments)


IMAGES, IDS, SAMPLES = torch.zeros(2, 3, 8, 8), torch.tensor([[0, 1], [2, 3]]), torch.tensor([5, 6])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"samples_B": SAMPLES[:1]}, ValueError, r"samples_B must be \(2,\)"),
        ({"samples_B": SAMPLES.int()}, TypeError, "int64"),
        ({"ids_BK": IDS + 1}, ValueError, r"ids must lie in \[0, 4\)"),
        ({"eps": 8}, ValueError, "write 8/255"),
        ({"patch_size": 3}, ValueError, "not divisible"),
    ],
)
def test_refuses(change, error, message):
    arguments = {"images_BCHW": IMAGES, "ids_BK": IDS, "patch_size": 4, "samples_B": SAMPLES, "eps": EPS} | change
    with pytest.raises(error, match=message):
        noisy_patches(**arguments, seed=0, step=0)
