"""Which attempts share the next pass through a model: an image is attacked until it is broken, and passes stay full.

An attempt is an image and the number of what is tried on it: a target class, a random start, both. All images' first
attempts come before any second one. A pass takes the next attempts on images that still stand, as many as it holds:
while many stand it is one attempt on each, later several attempts on each of the few that are left.

Both ways of attacking until broken hand out their attempts here: `until_broken.first_to_fool`, which has a batch of
images in memory and returns all of them attacked, and AutoAttack's waves (`evaluation/waves.py`), which walk through a
whole shard, are saved after each pass, and want the broken ones only.

Shapes: N images, R rows of a pass.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Attempts:
    """Attempts on images, handed out pass by pass; attempt j is number j // N on image j % N.

    Attributes:
        num_images: N.
        tries: attempts on each, numbered from 0 to tries − 1.
        done: how many were handed out or passed over; to go on after a kill, begin with it.
    """

    num_images: int
    tries: int
    done: int = 0

    def take(self, stands: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """The next pass.

        Args:
            stands: (N,) bool, the images that no attempt has broken.
            most: rows of the pass, 1 at least.
        Returns:
            (R,) int64 positions of images; (R,) int64 numbers of attempts. R is 0 when all is done.
        """
        total = self.num_images * self.tries
        left = torch.arange(self.done, total, device=stands.device)
        left = left[stands[left % max(self.num_images, 1)]]
        self.done = total if len(left) <= most else int(left[most - 1]) + 1
        left = left[:most]
        return left % max(self.num_images, 1), left // max(self.num_images, 1)


def first_of_each(owners: Tensor) -> Tensor:
    """(F,) int64 ascending: positions of the first row of each image; owners (R,) int64."""
    places = torch.arange(len(owners), device=owners.device)
    _, image = owners.unique(return_inverse=True)
    first = torch.full_like(places, len(owners)).scatter_reduce_(0, image, places, "amin")
    return first[first < len(owners)].sort().values
