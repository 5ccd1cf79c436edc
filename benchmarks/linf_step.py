"""How much does one pass save over the seven of a signed-gradient step?

Floor: read x_adv, grad and x, write the result: 16 bytes a number in fp32. In patch
space it is the same op on a quarter of the numbers.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.case import Case, Provider, Size, compiled, in_double, run_of
from mimir_fast.ops.linf_step import linf_step, linf_step_reference

ALPHA, EPS = 10 / 255, 8 / 255
SHAPES: dict[Size, list[tuple[int, ...]]] = {
    "tiny": [(2, 3, 8, 8)],
    "quick": [(64, 3, 224, 224)],
    "full": [(64, 3, 224, 224), (64, 49, 768), (1024, 49, 768)],
    "gpu": [(128, 3, 224, 224), (512, 3, 224, 224), (512, 49, 768), (1024, 49, 768)],
}
ours = partial(linf_step, alpha=ALPHA, eps=EPS)
definition = run_of(partial(linf_step_reference, alpha=ALPHA, eps=EPS))


def chain(x_adv: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    """The update as PGD implementations write it: one pass an operator."""
    delta = torch.clamp(x_adv + ALPHA * grad.sign() - x, min=-EPS, max=EPS)
    return torch.clamp(x + delta, min=0, max=1)


def cases(device: torch.device, size: Size) -> Iterator[Case]:
    """Image space and patch space, fp32: adversarial pixels are never rounded to bf16."""
    for shape in SHAPES[size]:
        yield case(device, shape)


def case(device: torch.device, shape: tuple[int, ...]) -> Case:
    """A signed-gradient step on images of one shape."""

    def make_inputs() -> tuple[Tensor, Tensor, Tensor]:
        x, noise, grad = torch.rand(shape), torch.randn(shape), torch.randn(shape)
        return (x + noise * EPS / 2).clamp(0, 1), grad, x

    mapped = partial(ours, out=torch.empty(shape, device=device))
    return Case(
        "linf_step",
        {"shape": "x".join(map(str, shape)), "dtype": "fp32"},
        [
            Provider("mimir_fast", run_of(ours)),
            Provider("mimir_fast, out=", run_of(mapped), note="into memory that is already mapped"),
            Provider("eager chain", run_of(chain)),
            Provider("definition", definition),
            Provider("torch.compile(chain)", run_of(compiled(chain))),
        ],
        baseline="eager chain",
        make_inputs=make_inputs,
        reference=in_double(definition),
        tolerance=1e-7,
        bytes=16.0 * torch.Size(shape).numel(),
        items=shape[0],
    )
