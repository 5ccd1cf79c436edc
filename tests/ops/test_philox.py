"""Counter-based random numbers: the generator itself, and the faster ways to the same bits."""

import numpy as np
import pytest
import torch

from mimir_fast import _native, philox
from mimir_fast.ops.random_uniform import random_start_linf, random_start_linf_reference, random_uniform
from mimir_fast.philox import Stream

SEED = (123 << 40) + 5
SAMPLES = torch.tensor([0, 7, 2**31 + 3, 41])
SHAPES = [(4, 196), (1, 1), (3, 4097), (4, 0), (2, 9001), (0, 5)]


def test_known_answers():
    """The vectors that come with Random123 (kat_vectors, philox4x32-10)."""
    ones = 0xFFFFFFFF
    vectors = [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones, ones, ones, ones), (ones << 32) | ones, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0x299F31D0 << 32) | 0xA4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, seed, expected in vectors:
        words = philox.philox4x32(tuple(torch.tensor(word) for word in counter), seed)
        assert tuple(int(word) for word in words) == expected


def test_a_number_depends_on_its_place_only(device):
    samples = SAMPLES.to(device)
    whole = random_uniform(SEED, Stream.MASK, 3, samples, 100)
    assert torch.equal(random_uniform(SEED, Stream.MASK, 3, samples[2:], 100), whole[2:])
    assert torch.equal(random_uniform(SEED, Stream.MASK, 3, samples, 37), whole[:, :37])
    for other in ((SEED + 1, Stream.MASK, 3), (SEED, Stream.CROP, 3), (SEED, Stream.MASK, 4), (-SEED, Stream.MASK, 3)):
        assert (random_uniform(*other, samples, 100) == whole).float().mean() < 0.05


def test_moments():
    numbers = random_uniform(1, Stream.ATTACK_START, 0, torch.arange(64), 4096)
    assert numbers.min() >= 0 and numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 4 * (1 / 12 / numbers.numel()) ** 0.5
    assert abs(numbers.var() - 1 / 12) < 1e-3
    assert torch.corrcoef(numbers).fill_diagonal_(0).abs().max() < 6 / 4096**0.5


@pytest.mark.parametrize("seed", [0, SEED, 2**64 - 1, -5], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_op_matches_definition(shape, seed, device):
    samples = SAMPLES[: shape[0]].to(device)
    expected = philox.uniform(seed, Stream.CROP, 2**20, samples, shape[1])
    assert torch.equal(random_uniform(seed, Stream.CROP, 2**20, samples, shape[1]), expected)


def test_a_step_for_each_sample(device):
    samples = SAMPLES.to(device)
    numbers = random_uniform(SEED, 0, torch.tensor([5, 6, 5, 9]), samples, 50)
    assert torch.equal(numbers[:2], torch.cat([random_uniform(SEED, 0, 5 + i, samples[i : i + 1], 50) for i in (0, 1)]))


def test_same_without_the_native_kernel(monkeypatch):
    x = torch.rand(4, 3, 9, 9)
    results = []
    for has in (_native.has, lambda function: False):
        monkeypatch.setattr(_native, "has", has)
        numbers = random_uniform(SEED, 0, 1, SAMPLES, 243)
        results.append((numbers, random_start_linf(x, SAMPLES, seed=SEED, step=1, eps=0.1)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(4, 3, 32, 32), (3, 49, 768), (2, 5), (0, 3), (2, 0)], ids=str)
def test_random_start_matches_definition(shape, dtype, device):
    x, samples = torch.rand(shape, dtype=dtype, device=device), SAMPLES[: shape[0]].to(device)
    start = random_start_linf(x, samples, seed=SEED, step=9, eps=8 / 255)
    assert torch.equal(start, random_start_linf_reference(x, samples, SEED, 9, 8 / 255))
    assert start.dtype == dtype


def test_random_start_fills_the_ball_and_stays_in_range():
    x = torch.rand(4, 3, 32, 32)
    start = random_start_linf(x, SAMPLES, seed=1, step=0, eps=0.1)
    assert start.min() >= 0 and start.max() <= 1
    assert 0.0999 < (start - x).abs().max() <= 0.1 + 1e-7
    inner = (x > 0.1) & (x < 0.9)
    assert abs((start - x)[inner].mean()) < 2e-3


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_random_start_does_not_leave_the_ball(dtype, per_channel, device):
    """In 16 bits x + noise is rounded by up to half a grey level."""
    x = torch.rand(4, 3, 32, 32, dtype=torch.float64).to(device, dtype)
    eps = torch.tensor([8.0, 4.0, 1.0], device=device).view(3, 1, 1) / 255 if per_channel else 8 / 255
    start = random_start_linf(x, SAMPLES.to(device), seed=1, step=0, eps=eps)
    rounding = {torch.float32: 3e-8, torch.float64: 6e-17}.get(dtype, 0.0)
    excess = (start.double() - x.double()).abs() - torch.as_tensor(eps, dtype=torch.float64, device=device)
    assert -0.002 < excess.max() <= rounding


def test_random_start_refuses_images_outside_of_the_range():
    x = 4 * torch.rand(4, 3, 8, 8) - 2
    for eps in (0.0, torch.zeros(3, 1, 1)):
        with pytest.raises(ValueError, match=r"x must lie in clamp, \[0, 1\], got numbers from -1.9.* to 1.9"):
            random_start_linf(x, SAMPLES, seed=1, step=0, eps=eps)
    assert torch.equal(random_start_linf_reference(x, SAMPLES, 1, 0, 0.0), x)
    assert random_start_linf(x, SAMPLES, seed=1, step=0, eps=2.0, clamp=(-2.0, 2.0)).abs().max() <= 2


def test_random_start_with_a_radius_per_channel_and_layout(device):
    x, samples = torch.rand(4, 3, 8, 8, device=device), SAMPLES.to(device)
    eps = torch.tensor([0.0, 0.05, 0.1], device=device).reshape(3, 1, 1)
    start = random_start_linf(x, samples, seed=1, step=0, eps=eps)
    assert torch.equal(start[:, 0], x[:, 0])
    assert torch.equal(start[:, 1], random_start_linf(x, samples, seed=1, step=0, eps=0.05)[:, 1])
    channels_last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(random_start_linf(channels_last, samples, seed=1, step=0, eps=eps), start)


def test_random_start_gradient(device):
    x = torch.rand(3, 40, dtype=torch.float64, device=device).requires_grad_()
    samples = SAMPLES[:3].to(device)
    starts = [
        random_start_linf(x, samples, seed=1, step=0, eps=0.3),
        random_start_linf_reference(x, samples, 1, 0, 0.3),
    ]
    weights = torch.rand_like(x)
    gradients = [torch.autograd.grad((start * weights).sum(), x)[0] for start in starts]
    clipped = (starts[0] == 0) | (starts[0] == 1)
    assert torch.equal(gradients[0][~clipped], gradients[1][~clipped])
    assert gradients[0][clipped].count_nonzero() == 0 and clipped.any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_uniform(shape, triton_device):
    from mimir_kernels import random_uniform as kernels

    samples = SAMPLES[: shape[0]].to(triton_device)
    expected = philox.uniform(SEED, Stream.CROP, 77, samples, shape[1])
    steps = torch.full_like(samples, 77)
    assert torch.equal(kernels.random_uniform(samples, steps, shape[1], SEED, int(Stream.CROP)), expected)


@pytest.mark.parametrize("shape", [(2, 3, 21, 20), (3, 5), (1, 4099)], ids=str)
def test_triton_random_start_linf(shape, triton_device):
    from mimir_kernels import random_uniform as kernels

    x, samples = torch.rand(shape, device=triton_device), SAMPLES[: shape[0]].to(triton_device)
    start = kernels.random_start_linf(x, samples, torch.full_like(samples, 9), -5, 2, 0.3, 0.1, 0.9)
    assert torch.equal(start, random_start_linf_reference(x, samples, -5, 9, 0.3, 2, 0.1, 0.9))


def test_registration(device):
    samples, x = SAMPLES.to(device), torch.rand(4, 3, 2, 2, device=device)
    steps = torch.full_like(samples, 2)
    torch.library.opcheck(torch.ops.mimir_fast.random_uniform, (samples, steps, 7, 1, 0))
    for images in (x, x.clone().requires_grad_(), x.contiguous(memory_format=torch.channels_last)):
        torch.library.opcheck(torch.ops.mimir_fast.random_start_linf, (images, samples, steps, 1, 2, 0.1, 0.0, 1.0))


def test_compiles_without_graph_break(device):
    samples, x = SAMPLES.to(device), torch.rand(4, 3, 2, 2, device=device)

    radii = torch.tensor([0.1, 0.0, 0.2], device=device).view(3, 1, 1)

    def start(x, step):
        x = random_start_linf(x, samples, seed=3, step=step, eps=radii)
        return random_start_linf(x, samples, seed=3, step=step, eps=0.1) + random_uniform(3, 0, step, samples, 1).sum()

    compiled = torch.compile(start, fullgraph=True, backend="aot_eager")
    for step in (0, 1, 2):
        torch.testing.assert_close(compiled(x, step), start(x, step))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"samples_B": torch.zeros(4)}, TypeError, "samples_B must be int64"),
        (
            {"samples_B": np.arange(4)},
            TypeError,
            "samples_B must be a torch.Tensor, got numpy.ndarray: use torch.from_",
        ),
        ({"samples_B": 3}, TypeError, "samples_B must be a torch.Tensor, got int: use torch.tensor"),
        ({"samples_B": torch.zeros(2, 2, dtype=torch.int64)}, ValueError, r"must be \(B,\)"),
        ({"samples_B": torch.zeros(3, dtype=torch.int64)}, ValueError, "one index for each of the 4"),
        ({"samples_B": torch.zeros(4, dtype=torch.int64, device="meta")}, ValueError, "one device"),
        ({"x": torch.zeros(4, 2, dtype=torch.uint8)}, TypeError, "floating point"),
        ({"eps": 8}, ValueError, "8/255, not 8"),
        ({"seed": 2**70}, ValueError, "64 bits"),
        ({"step": torch.zeros(3)}, ValueError, "one for each of 4 samples"),
        ({"clamp": (2.0, 1.0)}, ValueError, "low <= high"),
    ],
    ids=str,
)
def test_refuses(change, error, message):
    arguments = {"x": torch.zeros(4, 2), "samples_B": SAMPLES, "seed": 0, "step": 0, "eps": 0.1} | change
    with pytest.raises(error, match=message):
        random_start_linf(**arguments)
