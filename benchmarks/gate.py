"""The gate before the clock: a provider is timed only if it computes what the definition says.

Errors are ‖out − ref‖ / ‖ref‖ against float64. A NaN never passes. The provider's first outputs are overwritten with
NaN and freed before it runs again, so that the allocator hands it poisoned memory and an element it forgets shows.
"""

from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Case, Outputs, Provider


def judge(case: Case, provider: Provider, inputs: object, reference: Outputs) -> tuple[dict[str, Any], str]:
    """Run a provider twice and hold the second outputs against the reference.

    Returns:
        `Record.err`: `rel_fro` and `max_rel`, the largest `relative_errors` of all outputs (None under a law), and
        whether two runs on the same inputs gave the same bits; and why the provider does not pass, empty if it does.
    """
    first = provider.run(inputs)
    kept = [output.clone() for output in first]
    poison(first)
    del first
    outputs = provider.run(inputs)
    same = all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(kept, outputs, strict=True))
    err = {"ref": "law", "rel_fro": None, "max_rel": None, "deterministic_bits": same}
    if provider.law is not None:
        return err, provider.law(inputs, outputs)
    errors = [relative_errors(output, ref) for output, ref in zip(outputs, reference, strict=True)]
    rel_fro, max_rel = (max(pair[i] for pair in errors) for i in (0, 1))
    limits = case.tolerance if provider.tolerance is None else provider.tolerance
    each = limits if isinstance(limits, tuple) else [limits] * len(errors)
    # Written so that a NaN, for which every comparison is false, does not pass.
    bad = [
        f"output {i}: error {error[0]:.1e}, allowed {limit:.0e}"
        for i, (error, limit) in enumerate(zip(errors, each, strict=True))
        if not error[0] <= limit
    ]
    return err | {"ref": "fp64", "rel_fro": rel_fro, "max_rel": max_rel}, "; ".join(bad)


def relative_errors(output: Tensor, reference: Tensor) -> tuple[float, float]:
    """(‖out − ref‖ / ‖ref‖, max |out − ref| / max |ref|); the differences themselves where the reference is zero.

    Raises:
        ValueError: the shapes differ.
    """
    if output.shape != reference.shape:
        raise ValueError(f"the definition gives {tuple(reference.shape)}, the provider {tuple(output.shape)}")
    if not reference.numel():
        return 0.0, 0.0
    difference, ref = (output.double() - reference.double()).abs(), reference.double().abs()
    # max() of Python would drop a NaN; an infinite error is as clear.
    if bool(difference.isnan().any()):
        return float("inf"), float("inf")
    norm, largest = float(ref.norm()) or 1.0, float(ref.max()) or 1.0
    return float(difference.norm()) / norm, float(difference.max()) / largest


def poison(outputs: Outputs) -> None:
    """Overwrite with NaN; True or the largest number where there is none."""
    with torch.no_grad():
        for output in outputs:
            if output.is_floating_point():
                output.detach().fill_(float("nan"))
            else:
                output.fill_(True if output.dtype == torch.bool else torch.iinfo(output.dtype).max)
