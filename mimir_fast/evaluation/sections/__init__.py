"""The parts of a report, in its order; one file each: what to measure, what follows, how it looks (plan.Section)."""

from typing import cast

from mimir_fast.evaluation.plan import Section
from mimir_fast.evaluation.sections import (
    accuracy,
    autoattack,
    classes,
    corruptions,
    curve,
    examples,
    information,
    masking,
    reconstruction,
    shifts,
    surface,
    transfer,
    unforeseen,
)

SECTIONS: tuple[Section, ...] = tuple(
    cast(Section, module)
    for module in (
        accuracy, autoattack, masking, curve, classes, transfer, unforeseen, corruptions, shifts, reconstruction,
        information, surface, examples,
    )
)  # fmt: skip
