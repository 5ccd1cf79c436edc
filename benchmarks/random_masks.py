"""What do counter-based masks and noise cost beside a generator's?

The same mask for (seed, step, sample) on any device and rank is bought with Philox arithmetic. Definition: int64 tensor
operations. Beside it: MAE's two argsorts of `torch.rand`, which draws other numbers and is held against the law of a
mask instead. Floor: writing the ids, or reading and writing the images.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.case import Case, Outputs, Provider, Size, compiled, in_double, run_of
from mimir_fast.ops.random_masks import random_masks, random_masks_reference
from mimir_fast.ops.random_uniform import random_start_linf, random_start_linf_reference
from mimir_fast.philox import Stream

EPS = 8 / 255
# samples of a batch of masks, patches; samples of a batch of patches, numbers of each
SIZES: dict[Size, tuple[int, int, int, int]] = {
    "tiny": (2, 16, 2, 48),
    "quick": (512, 196, 64, 49 * 768),
    "full": (512, 196, 64, 49 * 768),
    "gpu": (1024, 196, 512, 49 * 768),
}


def cases(device: torch.device, size: Size) -> Iterator[Case]:
    """Masks of a batch, then the random start of an attack."""
    batch, num_patches, attacked, numbers = SIZES[size]
    yield masks_case(batch, num_patches)
    yield start_case(attacked, numbers)


def masks_case(batch: int, num_patches: int) -> Case:
    """The case: ids_keep and ids_masked of a batch."""
    num_keep = num_patches // 4
    ours = partial(random_masks, num_patches=num_patches, num_keep=num_keep, seed=3, step=5)

    def definition(samples: Tensor) -> Outputs:
        return random_masks_reference(samples, num_patches, num_keep, 3, 5, Stream.MASK, "sorted")

    def mae_way(samples: Tensor) -> Outputs:
        shuffle = torch.rand(batch, num_patches, device=samples.device).argsort(dim=1)
        restore = shuffle.argsort(dim=1)
        mask = torch.ones(batch, num_patches, device=samples.device)
        mask[:, :num_keep] = 0
        return shuffle[:, :num_keep], torch.gather(mask, 1, restore)

    def is_a_mask(_: Outputs, outputs: Outputs) -> str:
        keep, mask = outputs
        hidden = mask.sum(1) == num_patches - num_keep
        seen = mask.gather(1, keep) == 0
        return "" if bool(hidden.all() and seen.all()) else "ids and mask do not fit"

    return Case(
        "random_masks",
        {"samples": batch, "patches": num_patches, "kept": num_keep},
        [
            Provider("mimir_fast", run_of(ours)),
            Provider("definition", run_of(definition)),
            Provider(
                "torch.rand + 2 argsorts", run_of(mae_way), law=is_a_mask, note="MAE's; new numbers at every call"
            ),
        ],
        baseline="torch.rand + 2 argsorts",
        make_inputs=lambda: (some_samples(batch),),
        reference=run_of(definition),
        bytes=8.0 * batch * (num_patches + 2),
        items=batch,
    )


def start_case(batch: int, numbers: int) -> Case:
    """Uniform noise in the ball, added and clamped."""

    def definition(x: Tensor, samples: Tensor) -> Tensor:
        return random_start_linf_reference(x, samples, 3, 5, EPS)

    def rand_way(x: Tensor, samples: Tensor) -> Tensor:
        return (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)

    def in_the_ball(inputs: tuple[Tensor, Tensor], outputs: Outputs) -> str:
        far = float((outputs[0] - inputs[0]).abs().max())
        return "" if far <= EPS * (1 + 1e-5) else f"left the ball: {far}"

    return Case(
        "random_start_linf",
        {"shape": f"{batch}x{numbers}", "dtype": "fp32"},
        [
            Provider("mimir_fast", run_of(partial(random_start_linf, seed=3, step=5, eps=EPS))),
            Provider("definition", run_of(definition)),
            Provider("torch.compile(definition)", run_of(compiled(definition))),
            Provider("uniform_ + add + clamp", run_of(rand_way), law=in_the_ball, note="new numbers at every call"),
        ],
        baseline="uniform_ + add + clamp",
        make_inputs=lambda: (torch.rand(batch, numbers), some_samples(batch)),
        reference=in_double(run_of(definition)),
        tolerance=1e-6,
        bytes=8.0 * batch * numbers,
        items=batch,
    )


def some_samples(batch: int) -> Tensor:
    """Indices from a source that is larger than any."""
    return torch.randint(0, 2**40, (batch,))
