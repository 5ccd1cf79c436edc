"""What we expect of a GPU before one has run the code: a share of the roofline for each case, written down beforehand.

`predictions.json` is the record; a run on its device prints the predicted time beside the measured one. It is changed
only with the reason, after a measurement has proved it wrong.
"""

import json
from functools import cache
from pathlib import Path

FILE = Path(__file__).with_name("predictions.json")


@cache
def shares() -> dict[str, tuple[float, float]]:
    """Case → (low, high) share of the roofline."""
    found = json.loads(FILE.read_text())["share_of_roofline"]
    return {case: (low, high) for case, (low, high, _) in found.items()}


def device() -> str:
    """Of which the predictions are: part of the GPU's name."""
    return str(json.loads(FILE.read_text())["device"])


def expected_ms(case: str, floor_ms: float) -> tuple[float, float] | None:
    """(shortest, longest) predicted time of our version of a case, in ms; None where nothing was predicted."""
    if case not in shares() or not floor_ms:
        return None
    low, high = shares()[case]
    return floor_ms / high, floor_ms / low


def verdict(case: str, floor_ms: float, measured_ms: float) -> str:
    """The prediction beside the measurement, in words; empty where there is none."""
    span = expected_ms(case, floor_ms)
    if span is None:
        return ""
    shortest, longest = span
    words = "faster than" if measured_ms < shortest else "slower than" if measured_ms > longest else "as"
    return f"{words} predicted, {shortest:.3g} to {longest:.3g} ms"
