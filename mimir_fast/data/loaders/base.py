"""The one interface of all loaders: a stream of keys (mimir_fast.data.order) and a way to read them.

A loader is an iterable of `Batch`. Training streams never end and straddle epochs; evaluation is one pass in the
source's order with a short last batch. What a batch holds is a function of its number, so a loader knows only how many
whole batches were taken, however far its reader has read ahead. The position is counted in stream samples that whole
global batches have used up, so it means the same on any number of ranks.
"""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from mimir_fast.data.batch import Batch
from mimir_fast.data.identity import DataIdentity
from mimir_fast.data.order import BatchPlan, Cursor, KeyStream, MixedOrder, SampleOrder

_ORDER = "swap-or-not 1"  # which function orders the samples; a state says under which it was saved
_FEW = 0.01  # part of the samples that may come or go between two starts of a run
_LOG = logging.getLogger(__name__)


class Loader(ABC):
    """Yields this rank's micro-batches, `plan.accum_iter` of them for each global batch.

    Attributes:
        plan, order: how the stream is cut, and what stands in it.
        num_samples: samples in an epoch (of the real source where generated ones are mixed in).
        epoch_length: stream positions of an epoch: `num_samples`, or more where generated samples are mixed in.
        wait_seconds: time the consumer has waited for batches so far.
        skipped: unreadable files met so far on this rank, path -> reason.
        identity: of the data, stands in a state; None is not compared.
    """

    identity: DataIdentity | None = None

    def __init__(self, plan: BatchPlan, order: SampleOrder | MixedOrder) -> None:
        self.plan, self.order = plan, order
        self.num_samples, self.epoch_length = order.num_samples, order.epoch_length
        self.wait_seconds = 0.0
        self.skipped: dict[str, str] = {}
        self._cursor = self._first = Cursor()
        self._repositioned = 0

    @property
    def cursor(self) -> Cursor:
        """Where the next batch comes from."""
        return self._cursor

    @property
    def batches_per_epoch(self) -> int:
        """Global batches that cover an epoch, the last one perhaps in part."""
        return -(-self.epoch_length // self.plan.global_batch)

    @property
    def num_skipped(self) -> int:
        """Unreadable files met so far on this rank."""
        return len(self.skipped)

    def __iter__(self) -> Iterator[Batch]:
        """A training stream goes on where it is; an evaluation pass begins anew (or where it was loaded to)."""
        if self.plan.stop is not None:
            self._cursor, self._first = self._first, Cursor()
        generation = self._repositioned
        with closing(self._read(KeyStream(self.order, self.plan, self._cursor))) as batches:
            while True:
                started = time.perf_counter()
                batch = next(batches, None)
                self.wait_seconds += time.perf_counter() - started
                if batch is None:
                    return
                self._cursor = self.plan.advance(self._cursor)
                yield batch
                if generation != self._repositioned:
                    raise RuntimeError(
                        "load_state_dict moved this loader while it was iterated; call iter(loader) again"
                    )

    @abstractmethod
    def _read(self, keys: KeyStream) -> Generator[Batch, None, None]:
        """The micro-batches of `keys`, in its order."""

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and words; taken between steps it can be loaded on other ranks or with another batch size."""
        return {
            "position": self._cursor.position,
            "micro_step": self._cursor.micro_step,
            "global_batch": self.plan.global_batch,
            "accum_iter": self.plan.accum_iter,
            "num_samples": self.num_samples,
            "seed": self.order.seed,
            "order": self._order_name,
            **({"data": self.identity.state} if self.identity else {}),
        }

    @property
    def _order_name(self) -> str:
        block = self.order.block
        return f"{_ORDER}, blocks of {block}" if block else _ORDER

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken.

        A data set from which a few files were removed (or repaired ones added) since is gone on with, and so is a
        stream that another version ordered; a warning says that this epoch will not be exact.
        Raises:
            ValueError: another data set (by its number of samples, classes or names) or seed, or a state taken within
                an accumulated step on other ranks.
        """
        before, now = state["num_samples"], self.num_samples
        for name, was, ours in (("num_samples", before, now), ("seed", state["seed"], self.order.seed)):
            if was != ours and (name == "seed" or abs(before - now) > _FEW * before):
                raise ValueError(
                    f"the saved stream had {name} = {was}, this one has {ours}: it would continue on other "
                    "samples; resume with the same data and seed, or start a new run"
                )
        if self.identity and "data" in state:
            self.identity.compare(state["data"])
        same_cut = (state["global_batch"], state["accum_iter"]) == (self.plan.global_batch, self.plan.accum_iter)
        if state["micro_step"] and not same_cut:
            raise ValueError(
                f"the state was saved within a step (after {state['micro_step']} of its micro-batches); it can only be "
                "resumed with the same batch size, ranks and accum_iter"
            )
        if before != now:
            _LOG.warning(
                "the data set had %d samples when this run was saved and has %d now: going on at the same place; in "
                "this epoch some samples may come twice and others not", before, now,
            )  # fmt: skip
        elif state.get("order") != self._order_name:
            _LOG.warning(
                "this run was saved under another order of samples (%s; now %s): in this epoch some samples come twice "
                "and others not", state.get("order", "sorted keys"), self._order_name,
            )  # fmt: skip
        self._cursor = self._first = Cursor(state["position"], state["micro_step"])
        self._repositioned += 1

    def close(self) -> None:  # noqa: B027 (not every loader holds something)
        """Free workers and device memory; the loader cannot be used afterwards."""


def to_channels(images_BCHW: Tensor, channels: int) -> Tensor:
    """(B, channels, H, W): grey repeated to colour, colour weighed to grey (ITU-R 601; uint8 rounded as PIL does)."""
    if images_BCHW.shape[1] == channels:
        return images_BCHW
    if channels == 3:
        return images_BCHW.expand(-1, 3, -1, -1).contiguous()
    weights = torch.tensor([19595, 38470, 7471], dtype=torch.int32, device=images_BCHW.device).view(1, 3, 1, 1)
    if images_BCHW.is_floating_point():
        return (images_BCHW * weights).sum(1, keepdim=True) / 2**16
    return (((images_BCHW.int() * weights).sum(1, keepdim=True) + 0x8000) >> 16).to(torch.uint8)
