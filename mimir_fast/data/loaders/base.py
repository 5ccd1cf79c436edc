"""The one interface of all loaders, and what they share: position, resuming, waiting time, skipped files.

A loader is an iterable of `Batch`. Training streams never end and straddle epochs; evaluation is one pass in the
source's order with a short last batch. The position is the number of stream samples that whole global batches have used
up, so it means the same on any number of ranks.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mimir_fast.data.batch import Batch
from mimir_fast.data.order import BatchPlan, Cursor, MixedOrder, SampleOrder


class Loader(ABC):
    """Yields this rank's micro-batches, `plan.accum_iter` of them for each global batch.

    Attributes:
        plan, order: how the stream is cut, and what stands in it.
        num_samples: samples in an epoch (of the real source where generated ones are mixed in).
        epoch_length: stream positions of an epoch: `num_samples`, or more where generated samples are mixed in.
        wait_seconds: time the consumer has waited for batches so far.
        skipped: unreadable files met so far on this rank, path -> reason.
    """

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

    def __iter__(self) -> Iterator[Batch]:
        """A training stream goes on where it is; an evaluation pass begins anew (or where it was loaded to)."""
        if self.plan.stop is not None:
            self._cursor, self._first = self._first, Cursor()
        generation = self._repositioned
        batches = self._batches(self._cursor)
        while not self.plan.is_over(self._cursor):
            cursor = self._cursor
            self._cursor = self.plan.advance(cursor)
            if self.plan.span(cursor)[0] == self.plan.span(cursor)[1]:
                continue  # a rank's share of the last global batch can be empty
            started = time.perf_counter()
            batch = next(batches)
            self.wait_seconds += time.perf_counter() - started
            yield batch
            if generation != self._repositioned:
                raise RuntimeError("load_state_dict moved this loader while it was iterated; call iter(loader) again")

    @abstractmethod
    def _batches(self, cursor: Cursor) -> Iterator[Batch]:
        """This rank's non-empty micro-batches from `cursor` on."""

    def state_dict(self) -> dict[str, Any]:
        """Plain integers; taken between steps it can be loaded on other ranks or with another batch size."""
        return {
            "position": self._cursor.position,
            "micro_step": self._cursor.micro_step,
            "global_batch": self.plan.global_batch,
            "accum_iter": self.plan.accum_iter,
            "num_samples": self.num_samples,
            "seed": self.order.seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            ValueError: another data set or seed, or a state taken within an accumulated step on other ranks.
        """
        for name, ours in (("num_samples", self.num_samples), ("seed", self.order.seed)):
            if state[name] != ours:
                raise ValueError(
                    f"the saved stream had {name} = {state[name]}, this one has {ours}: it would continue on other "
                    "samples; resume with the same data and seed, or start a new run"
                )
        same_cut = (state["global_batch"], state["accum_iter"]) == (self.plan.global_batch, self.plan.accum_iter)
        if state["micro_step"] and not same_cut:
            raise ValueError(
                f"the state was saved within a step (after {state['micro_step']} of its micro-batches); it can only be "
                "resumed with the same batch size, ranks and accum_iter"
            )
        self._cursor = self._first = Cursor(state["position"], state["micro_step"])
        self._repositioned += 1

    def close(self) -> None:  # noqa: B027 (not every loader holds something)
        """Free workers and device memory; the loader cannot be used afterwards."""


def to_channels(images_BCHW: Tensor, channels: int) -> Tensor:
    """(B, channels, H, W) uint8: grey repeated to colour, colour weighed to grey (ITU-R 601, rounded as PIL does)."""
    if images_BCHW.shape[1] == channels:
        return images_BCHW
    if channels == 3:
        return images_BCHW.expand(-1, 3, -1, -1).contiguous()
    weights = torch.tensor([19595, 38470, 7471], dtype=torch.int32, device=images_BCHW.device).view(1, 3, 1, 1)
    return (((images_BCHW.int() * weights).sum(1, keepdim=True) + 0x8000) >> 16).to(torch.uint8)
