"""A case: one problem, several providers that claim to solve it, and the definition they are held against."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.memory import Process
from benchmarks.products import Products

Outputs = tuple[Tensor, ...]
Size = Literal["tiny", "quick", "full"]
"""tiny: does it run at all; quick: a laptop, a few minutes in all; full: the sizes the project's promises are about."""


@dataclass(frozen=True)
class Provider:
    """One way to compute the outputs.

    Attributes:
        name: what the table calls it; ours begin with `mimir_fast`.
        run: one set of inputs → outputs, freshly allocated, gradients among them where the case has a backward pass.
        tolerance: overrides the case's, for a formula that is known to be inexact; `note` says why.
        precision: overrides the case's, where the providers of a case compute in different ones.
        law: (inputs, outputs) → what is wrong, or nothing. For a provider that draws random numbers of its own and so
            cannot equal the definition; it is held against this instead.
        reference: its own definition, where the providers of a case do different things (a MAE step beside MIMIR's).
        report: further numbers, asked for after the timing.
        flops, products: its own, where it does other work than the case's.
        process: the one that does the work, where it is another (apart.py): its memory counts.
        skip: why it cannot run here; empty if it can.
    """

    name: str
    run: Callable[[Any], Outputs]
    tolerance: float | tuple[float, ...] | None = None
    precision: str = ""
    law: Callable[[Any, Outputs], str] | None = None
    reference: Callable[[Any], Outputs] | None = None
    report: Callable[[], dict[str, float]] | None = None
    flops: float | None = None
    products: Products | None = None
    note: str = ""
    process: Process | None = None
    skip: str = ""


@dataclass(frozen=True)
class Case:
    """One line of the plan.

    Attributes:
        name: `hsic_fwd_bwd`, …; with `params` it identifies the case between runs.
        providers: ours first.
        baseline: the provider others are compared with.
        make_inputs: seed → fresh random inputs on the device.
        reference: inputs → outputs of the definition, in float64 where rounding plays a part.
        tolerance: largest ‖out − ref‖ / ‖ref‖ of each output; 0 demands equality.
        flops, bytes: the fewest a forward (and backward) pass can do: the roofline, and the prediction.
        products: of which the work consists, where their own rate is worth knowing beside that of a large one.
        precision: which matmul ceiling the FLOPs are held against.
        items: images or samples of a call, for items per second.
        gate_inputs: seed → smaller inputs for the gate, where the definition would not fit; None for `make_inputs`.
        one_set: time on one set of inputs, where a set is too large for several or is never read twice.
        ratios: name → (provider, other): further quotients of medians worth naming.
        memory: measure the peak memory; off where another process would do the work.
    """

    name: str
    params: dict[str, Any]
    providers: Sequence[Provider]
    baseline: str
    make_inputs: Callable[[int], Any]
    reference: Callable[[Any], Outputs]
    tolerance: float | tuple[float, ...]
    flops: float = 0.0
    bytes: float = 0.0
    products: Products | None = None
    precision: str = "fp32"
    items: int = 0
    gate_inputs: Callable[[int], Any] | None = None
    one_set: bool = False
    ratios: dict[str, tuple[str, str]] = field(default_factory=dict)
    memory: bool = True

    def __post_init__(self) -> None:
        names = [provider.name for provider in self.providers]
        if self.baseline not in names or len(set(names)) < len(names):
            raise ValueError(f"case {self.name}: baseline {self.baseline!r} must be one of distinct {names}")

    @property
    def labels(self) -> list[str]:
        """What `--only` may call it."""
        return [self.name, *(f"{name}={value}" for name, value in self.params.items())]


Cases = Callable[[torch.device, Size], Iterator[Case]]


def is_ours(name: str) -> bool:
    """Whether a provider is the package's: what must be right, and what a comparison watches."""
    return name.startswith("mimir_fast")


def tensors_in(inputs: Any) -> list[Tensor]:
    """The tensors of a set of inputs, however nested."""
    if isinstance(inputs, Tensor):
        return [inputs]
    if isinstance(inputs, dict):
        inputs = list(inputs.values())
    if hasattr(inputs, "__dataclass_fields__"):
        inputs = list(vars(inputs).values())
    if isinstance(inputs, list | tuple):
        return [tensor for part in inputs for tensor in tensors_in(part)]
    return []


def bytes_of(inputs: Any) -> int:
    """Size of all tensors in a set of inputs."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(inputs))


def generator(device: torch.device, seed: int) -> torch.Generator:
    """A generator of its own for each set of inputs: the global one is left alone."""
    return torch.Generator(device).manual_seed(seed)


def with_gradients(function: Callable[..., Tensor], *wanted: int, grad: int | None = None) -> Callable[[Any], Outputs]:
    """inputs → (value, gradients to the inputs at the places `wanted`).

    Args:
        grad: place of the gradient that comes from above; the others are the function's arguments. None for a scalar.
    """

    def run(inputs: Sequence[Tensor]) -> Outputs:
        arguments = [t for i, t in enumerate(inputs) if i != grad]
        value = function(*arguments)
        above = None if grad is None else inputs[grad]
        return value.detach(), *torch.autograd.grad(value, [inputs[i] for i in wanted], above)

    return run


def in_double(run: Callable[[Any], Outputs]) -> Callable[[Any], Outputs]:
    """The same in float64, on the inputs as rounded."""

    def exact(t: Tensor) -> Tensor:
        return t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t

    return lambda inputs: run([exact(t) for t in inputs])


def finite(inputs: Any, outputs: Outputs) -> str:
    """The law of what has no definition to be held against."""
    return "" if all(bool(output.isfinite().all()) for output in outputs) else "not finite"


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` with static shapes, as a tuned baseline would have it."""
    return torch.compile(function, dynamic=False)
