"""How far a kernel's numbers may lie from the exact ones: a rule that holds on every processor.

    ‖found − exact‖ ≤ 2 ‖theirs − exact‖ + floor

`theirs` are PyTorch's numbers by the same formula in the same precision, which may be exact by luck. The floor is what
the exact numbers change by if every input does in its last places. It grows with the numbers that are summed, even if
their sum is zero, and it is the same on all machines.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Roundings on the way of a number through a kernel that sums in float32.
FLOAT32 = 4 * torch.finfo(torch.float32).eps
# One rounding to bfloat16; the sums are float32's.
BFLOAT16 = torch.finfo(torch.bfloat16).eps
DRAWS = 4


def assert_as_accurate(
    found: Sequence[Tensor],
    theirs: Sequence[Tensor],
    exactly: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    by: float,
    factor: float = 2,
) -> None:
    """The rule for each output; all three give the same outputs, in one order.

    Args:
        exactly: the formula; called with the inputs in float64.
        by: how much an input may be off, relatively: FLOAT32 or BFLOAT16.
    """
    inputs = [t.detach().cpu().double() for t in inputs]
    exact = [t.detach() for t in exactly(*inputs)]
    floors = [0.0] * len(exact)
    rng = torch.Generator().manual_seed(0)
    for _ in range(DRAWS):
        moved = exactly(*(t * (1 + by * (2 * torch.rand(t.shape, generator=rng, dtype=t.dtype) - 1)) for t in inputs))
        floors = [max(floor, float((m.detach() - e).norm())) for floor, m, e in zip(floors, moved, exact, strict=True)]
    for index, (mine, other, truth, floor) in enumerate(zip(found, theirs, exact, floors, strict=True)):
        error, reference = (float((t.detach().cpu().double() - truth).norm()) for t in (mine, other))
        assert mine.shape == truth.shape
        assert error <= factor * reference + floor, f"output {index}: {error:.3g}, theirs {reference:.3g} + {floor:.3g}"
