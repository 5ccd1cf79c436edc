"""Learning rate as a function of the step: linear warm-up, then half a cosine down to `min_lr`, or falls to a tenth.

Nothing is remembered between calls, so resuming needs no state.
"""

import math
from collections.abc import Sequence


def cosine_schedule(step: int, *, total_steps: int, warmup_steps: int, peak: float, minimum: float = 0.0) -> float:
    """The learning rate of `step` (0-based)."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def stepped_schedule(step: int, *, total_steps: int, warmup_steps: int, peak: float, drops: Sequence[float]) -> float:
    """The learning rate of `step` (0-based), a tenth of what it was from each of `drops` on (parts of the run)."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * 0.1 ** sum(step >= round(part * total_steps) for part in drops)
