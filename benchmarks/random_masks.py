"""What do counter-based masks and noise cost beside a generator's?

The same mask for (seed, step, sample) on any device and rank is bought with Philox arithmetic. Definition: int64 tensor
operations. Beside it: MAE's two argsorts of `torch.rand`, which draws other numbers and is held against the law of a
mask instead. Floor: writing the ids, or reading and writing the images.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.case import Case, Outputs, Provider, Size, compiled, generator
from mimir_fast.ops.random_masks import random_masks, random_masks_reference
from mimir_fast.ops.random_uniform import random_start_linf, random_start_linf_reference
from mimir_fast.philox import Stream

EPS = 8 / 255


def cases(device: torch.device, size: Size) -> Iterator[Case]:
    """Masks of a batch, then the random start of an attack."""
    cuda = device.type == "cuda"
    batch = 2 if size == "tiny" else 1024 if cuda else 512
    yield masks_case(device, batch, 16 if size == "tiny" else 196)
    yield start_case(device, 2 if size == "tiny" else 512 if cuda else 64, 48 if size == "tiny" else 49 * 768)


def masks_case(device: torch.device, batch: int, num_patches: int) -> Case:
    """ids_keep and ids_masked."""
    num_keep = num_patches // 4

    def make_inputs(seed: int) -> Tensor:
        return torch.randint(0, 2**40, (batch,), device=device, generator=generator(device, seed))

    def definition(samples: Tensor) -> Outputs:
        return random_masks_reference(samples, num_patches, num_keep, 3, 5, Stream.MASK, "sorted")

    draws = generator(device, 0)

    def mae_way(samples: Tensor) -> Outputs:
        noise = torch.rand(len(samples), num_patches, device=device, generator=draws)
        shuffle = noise.argsort(dim=1)
        restore = shuffle.argsort(dim=1)
        mask = torch.ones(len(samples), num_patches, device=device)
        mask[:, :num_keep] = 0
        return shuffle[:, :num_keep], torch.gather(mask, 1, restore)

    def is_a_mask(samples: Tensor, outputs: Outputs) -> str:
        keep, mask = outputs
        hidden = mask.sum(1) == num_patches - num_keep
        seen = mask.gather(1, keep) == 0
        return "" if bool(hidden.all() and seen.all()) else "ids and mask do not fit"

    return Case(
        "random_masks",
        {"samples": batch, "patches": num_patches, "kept": num_keep},
        [
            Provider("mimir_fast", lambda s: random_masks(s, num_patches, num_keep, seed=3, step=5)),
            Provider("definition", definition),
            Provider("torch.rand + 2 argsorts", mae_way, law=is_a_mask, note="MAE's; other numbers at every call"),
        ],
        baseline="torch.rand + 2 argsorts",
        make_inputs=make_inputs,
        reference=definition,
        tolerance=0.0,
        bytes=8.0 * batch * (num_patches + 2),
        items=batch,
    )


def start_case(device: torch.device, batch: int, numbers: int) -> Case:
    """Uniform noise in the ball, added and clamped."""

    def make_inputs(seed: int) -> tuple[Tensor, Tensor]:
        rng = generator(device, seed)
        samples = torch.randint(0, 2**40, (batch,), device=device, generator=rng)
        return torch.rand(batch, numbers, device=device, generator=rng), samples

    def definition(x: Tensor, samples: Tensor) -> Tensor:
        return random_start_linf_reference(x, samples, 3, 5, EPS)

    draws = generator(device, 0)

    def rand_way(inputs: tuple[Tensor, Tensor]) -> Outputs:
        x = inputs[0]
        noise = torch.empty_like(x).uniform_(-EPS, EPS, generator=draws)
        return ((x + noise).clamp(0, 1),)

    def in_the_ball(inputs: tuple[Tensor, Tensor], outputs: Outputs) -> str:
        far = float((outputs[0] - inputs[0]).abs().max())
        return "" if far <= EPS * (1 + 1e-5) else f"left the ball: {far}"

    fused = compiled(definition)
    return Case(
        "random_start",
        {"shape": f"{batch}x{numbers}", "dtype": "fp32"},
        [
            Provider("mimir_fast", lambda inputs: (random_start_linf(*inputs, seed=3, step=5, eps=EPS),)),
            Provider("definition", lambda inputs: (definition(*inputs),)),
            Provider("torch.compile(definition)", lambda inputs: (fused(*inputs),)),
            Provider("uniform_ + add + clamp", rand_way, law=in_the_ball, note="other numbers at every call"),
        ],
        baseline="uniform_ + add + clamp",
        make_inputs=make_inputs,
        reference=lambda inputs: (definition(inputs[0].double(), inputs[1]),),
        tolerance=1e-6,
        bytes=8.0 * batch * numbers,
        items=batch,
    )
