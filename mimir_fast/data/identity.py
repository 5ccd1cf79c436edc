"""Whether the data that a run goes on with are those it began with: by classes and by a sample of names.

The sample is a bottom-k sketch (Cohen and Kaplan, 2007): the smallest of the names' hashes. What two sketches share
estimates what the two sets share, so that a few files gone are told from another data set, with numbers that fit into
a checkpoint. The place of the data is not part of it.
"""

import hashlib
import json
from functools import cached_property
from typing import Any

import numpy as np

from mimir_fast.data.sources.base import ImageSource

_NAMES = 128  # in a sketch
_CANDIDATES = 4096  # smallest hashes, among which some may be equal
_ALIKE = 0.9  # part of the names that must be shared


class DataIdentity:
    """What a source's data are known by; made when it is first asked for (0.1 s for a million files).

    Args:
        source: the whole split, without limit or what is held out.
    """

    def __init__(self, source: ImageSource) -> None:
        self._source = source

    @cached_property
    def state(self) -> dict[str, Any]:
        """Plain words and numbers: `classes`, a digest of their names in order, and `sketch`."""
        classes = hashlib.sha256(json.dumps(list(self._source.classes)).encode()).hexdigest()[:16]
        found = self._source.identities()
        if len(found) > _CANDIDATES:
            found = np.partition(found, _CANDIDATES)[:_CANDIDATES]  # np.unique of a million takes a second
        return {"classes": classes, "sketch": np.unique(found)[:_NAMES].tolist()}

    def compare(self, before: dict[str, Any]) -> None:
        """Raises ValueError if `before` is the state of other data."""
        place = f"the data of this run (source {self._source.name})"
        if before["classes"] != self.state["classes"]:
            raise ValueError(
                f"{place} had other classes when it was saved, or other names of them, and would go on with labels "
                "that mean something else; resume with the same data, or start a new run"
            )
        was, now = set(before["sketch"]), set(self.state["sketch"])
        smallest = sorted(was | now)[: max(len(was), len(now), 1)]
        shared = sum(name in was and name in now for name in smallest)
        if shared < _ALIKE * len(smallest):
            raise ValueError(
                f"{place} were other files when it was saved: of {len(smallest)} names or contents {shared} are the "
                "same; resume with the same data (--data.root), or start a new run"
            )
