"""Learning rate as a function of the step: linear warm-up, then half a cosine down to `min_lr`."""

import math


def cosine_schedule(step: int, *, total_steps: int, warmup_steps: int, peak: float, minimum: float = 0.0) -> float:
    """The learning rate of `step` (0-based); nothing is remembered between calls, so resuming needs no state."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
