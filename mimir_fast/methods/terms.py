"""A loss as a list of named, weighted terms."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Term(NamedTuple):
    """weight · value; the value is a scalar and is logged under its name, without the weight."""

    name: str
    value: Tensor
    weight: float = 1.0


def total(terms: Sequence[Term], **extra: Tensor) -> dict[str, Tensor]:
    """{"loss": Σ weight·value, and where there are several: each value by name}; all but the loss detached."""
    first, *others = terms
    loss = first.value if first.weight == 1 else first.weight * first.value
    for term in others:
        loss = loss + (term.value if term.weight == 1 else term.weight * term.value)
    parts = {term.name: term.value.detach() for term in terms} if others else {}
    return {"loss": loss} | parts | {name: value.detach() for name, value in extra.items()}
