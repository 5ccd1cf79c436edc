"""Numbers that are NaN or infinite, which JSON does not have and no mean survives."""

import math
from typing import Any

from torch import Tensor


def finite(value: Any) -> Any:
    """Numbers in dicts, lists and tuples with None in place of NaN and infinity; tuples become lists."""
    if isinstance(value, dict):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def finite_mean(values: Tensor) -> float:
    """The mean of those that are finite; NaN where none is."""
    return float(values[values.isfinite()].double().mean())
