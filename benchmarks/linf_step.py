"""How much does one pass save over the seven of a signed-gradient step?

Floor: read x_adv, grad and x, write the result: 16 bytes a number in fp32. In patch
space it is the same op on a quarter of the numbers.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.case import Case, Outputs, Provider, Size, compiled, generator, in_double
from mimir_fast.ops.linf_step import linf_step, linf_step_reference

ALPHA, EPS = 10 / 255, 8 / 255
Triple = tuple[Tensor, Tensor, Tensor]

SHAPES: dict[Size, list[tuple[int, ...]]] = {
    "tiny": [(2, 3, 8, 8)],
    "quick": [(64, 3, 224, 224)],
    "full": [(64, 3, 224, 224), (64, 49, 768), (1024, 49, 768)],
}
ON_GPU: list[tuple[int, ...]] = [(128, 3, 224, 224), (512, 3, 224, 224), (512, 49, 768), (1024, 49, 768)]


def chain(x_adv: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    """The update as PGD implementations write it: one pass an operator."""
    delta = torch.clamp(x_adv + ALPHA * grad.sign() - x, min=-EPS, max=EPS)
    return torch.clamp(x + delta, min=0, max=1)


def cases(device: torch.device, size: Size) -> Iterator[Case]:
    """Image space and patch space."""
    for shape in ON_GPU if device.type == "cuda" and size != "tiny" else SHAPES[size]:
        yield case(device, shape)


def case(device: torch.device, shape: tuple[int, ...]) -> Case:
    """One shape, fp32: adversarial pixels are never rounded to bf16."""

    def make_inputs(seed: int) -> Triple:
        rng = generator(device, seed)
        x = torch.rand(shape, device=device, generator=rng)
        noise, grad = (torch.randn(shape, device=device, generator=rng) for _ in range(2))
        return (x + noise * EPS / 2).clamp(0, 1), grad, x

    def definition(inputs: Triple) -> Outputs:
        x_adv, grad, x = inputs
        return (linf_step_reference(x_adv, grad, x, ALPHA, EPS),)

    buffer = torch.empty(shape, device=device)

    def into_buffer(inputs: Triple) -> Outputs:
        return (linf_step(*inputs, alpha=ALPHA, eps=EPS, out=buffer),)

    fused = compiled(chain)
    count = torch.Size(shape).numel()
    return Case(
        "linf_step",
        {"shape": "x".join(map(str, shape)), "dtype": "fp32"},
        [
            Provider("mimir_fast", lambda inputs: (linf_step(*inputs, alpha=ALPHA, eps=EPS),)),
            Provider("mimir_fast, out=", into_buffer, note="into memory that is already mapped"),
            Provider("eager chain", lambda inputs: (chain(*inputs),)),
            Provider("definition", definition),
            Provider("torch.compile(chain)", lambda inputs: (fused(*inputs),)),
        ],
        baseline="eager chain",
        make_inputs=make_inputs,
        reference=in_double(definition),
        tolerance=1e-7,
        bytes=16.0 * count,
        items=shape[0],
    )
