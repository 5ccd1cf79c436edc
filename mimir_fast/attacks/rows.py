"""Searches on rows: images that are attacked side by side and do not feel each other, and leave when they are broken.

A row is an image with what a part of an attack wants of it, a target class or a restart. The attacks of AutoAttack
(APGD, FAB, Square) are such searches; `run_rows` takes steps until the end, and drops an image's rows as soon as one of
them is misclassified: an image is broken once, whatever its other rows would find.

Shapes: R rows, C channels, H × W pixels.
"""

from typing import Protocol

import torch
from torch import Tensor

from mimir_fast.attacks.passes import first_of_each

LOOK_EVERY = {"cpu": 1}
"""Steps between two looks at what is broken; elsewhere, where the device would have to be waited for, 8."""


class Rows(Protocol):
    """A search on R rows."""

    def finished(self) -> bool:
        """Whether all steps are taken."""

    def step(self) -> tuple[Tensor, Tensor]:
        """One step: (R,) bool, misclassified within the ball; (R, C, H, W), where they are."""

    def select(self, rows: Tensor) -> None:
        """Go on with these rows only, (R',) int64, in this order."""


def run_rows(search: Rows, owners: Tensor) -> tuple[Tensor, Tensor]:
    """Steps until all are taken or every image is broken.

    Args:
        owners: (R,) int64: which image a row belongs to.
    Returns:
        (F,) int64 the images that were broken, each once; (F, C, H, W) where.
    """
    broken: list[Tensor] = []
    where: list[Tensor] = []
    every, taken = LOOK_EVERY.get(owners.device.type, 8), 0
    found = kept = None
    while len(owners) and not search.finished():
        wrong, x = search.step()
        kept = x if found is None or kept is None else torch.where((wrong & ~found).view(-1, 1, 1, 1), x, kept)
        found = wrong if found is None else found | wrong
        taken += 1
        if taken % every and not search.finished():
            continue
        rows = found.nonzero()[:, 0]
        if len(rows):
            first = first_of_each(owners[rows])
            broken.append(owners[rows[first]])
            where.append(kept[rows[first]])
            stay = (~torch.isin(owners, broken[-1])).nonzero()[:, 0]
            owners = owners[stay]
            search.select(stay)
        found = kept = None
    if not broken:
        return owners[:0], torch.empty(0, device=owners.device)
    return torch.cat(broken), torch.cat(where)


def searched(search: Rows, images: Tensor, owners: Tensor) -> Tensor:
    """(R, C, H, W): the rows' images as the search leaves them, those of a broken image where it was broken.

    Args:
        images: (R, C, H, W), as they were.
        owners: as of `run_rows`.
    """
    broken, where = run_rows(search, owners)
    found = images.clone()
    if len(broken):
        rows, which = (owners[:, None] == broken).nonzero(as_tuple=True)
        found[rows] = where[which]
    return found


def select_all(state: object, rows: Tensor, *names: str) -> None:
    """Keep these rows of the named tensors of an object."""
    for name in names:
        setattr(state, name, getattr(state, name)[rows])
