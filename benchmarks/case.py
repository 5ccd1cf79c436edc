"""A case: one problem, several providers that claim to solve it, and the definition they are held against."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.products import Products

Outputs = tuple[Tensor, ...]
Run = Callable[[Any], Outputs]
Size = Literal["tiny", "quick", "full", "gpu"]
"""tiny: does it run at all; quick: a laptop, a few minutes in all; full: the sizes the project's promises are about;
gpu: those that fill a GPU."""


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
        skip: why it cannot run here; empty if it can.
    """

    name: str
    run: Run
    tolerance: float | tuple[float, ...] | None = None
    precision: str = ""
    law: Callable[[Any, Outputs], str] | None = None
    reference: Run | None = None
    report: Callable[[], dict[str, float]] | None = None
    flops: float | None = None
    products: Products | None = None
    note: str = ""
    skip: str = ""


@dataclass(frozen=True)
class Case:
    """One line of the plan.

    Attributes:
        name: `hsic_fwd_bwd`, …; with `params` it identifies the case between runs.
        providers: ours first.
        baseline: the provider others are compared with.
        make_inputs: fresh random inputs; called with the seed set and the device as torch's default.
        reference: inputs → outputs of the definition, in float64 where rounding plays a part.
        tolerance: largest ‖out − ref‖ / ‖ref‖ of each output; 0 demands equality.
        flops, bytes: the fewest a forward (and backward) pass can do: the roofline, and the prediction.
        products: of which the work consists, where their own rate is worth knowing beside that of a large one.
        precision: which matmul ceiling the FLOPs are held against.
        items: images or samples of a call, for items per second.
        gate_inputs: smaller inputs for the gate, where the definition would not fit; None for `make_inputs`.
        ratios: name → (provider, other): further quotients of medians worth naming.
        memory: measure the peak memory; off where another process would do the work.
    """

    name: str
    params: dict[str, Any]
    providers: Sequence[Provider]
    baseline: str
    make_inputs: Callable[[], Any] = tuple
    reference: Run = lambda inputs: ()
    tolerance: float | tuple[float, ...] = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    products: Products | None = None
    precision: str = "fp32"
    items: int = 0
    gate_inputs: Callable[[], Any] | None = None
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


def run_of(function: Callable[..., Any], wanted: Sequence[int] = (), above: int | None = None) -> Run:
    """inputs → (value or values, gradients to the inputs at the places `wanted`).

    Args:
        above: place of the gradient that comes from above; the others are the function's arguments. None for a scalar.
    """

    def run(inputs: Sequence[Tensor]) -> Outputs:
        value = function(*(t for i, t in enumerate(inputs) if i != above))
        if not wanted:
            return value if isinstance(value, tuple) else (value,)
        gradient = None if above is None else inputs[above]
        return value.detach(), *torch.autograd.grad(value, [inputs[i] for i in wanted], gradient)

    return run


def in_double(run: Run) -> Run:
    """The same in float64, on the inputs as rounded."""

    def exact(t: Tensor) -> Tensor:
        return t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t

    return lambda inputs: run([exact(t) for t in inputs])


def finite(inputs: Any, outputs: Outputs) -> str:
    """The law of what has no definition to be held against."""
    return "" if all(bool(output.isfinite().all()) for output in outputs) else "not finite"


compiled = partial(torch.compile, dynamic=False)  # with static shapes, as a tuned baseline would have it
