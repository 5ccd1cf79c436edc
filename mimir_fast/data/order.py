"""Which sample comes when: the training stream as a function of (seed, position).

The stream is the concatenation of the epochs' orders. Global batch s is the positions [s G, (s+1) G): a batch may
straddle two epochs, so nothing is dropped and every sample comes exactly once an epoch. A global batch is cut into
`world_size * accum_iter` micro-batches; rank r works on `accum_iter` neighbouring ones. So what a micro-batch holds
depends on neither the rank count nor whether the step was split over ranks or over accumulation.

The order of an epoch is a bijection of positions that is computed for the positions that are wanted, and only for them:
no list of all samples is made, sorted or kept, whether there are fifty samples or fifty million.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache

import numpy as np

from mimir_fast.philox import Stream

_ROUNDS = 24
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)  # of splitmix64
BLOCKS_IN_WINDOW = 64

Key = tuple[np.ndarray, np.ndarray]
"""What a micro-batch is made of: samples and epochs, both (B,) int64."""


def shuffled(
    positions: np.ndarray, num_samples: int, seed: int, epoch: int, stream: int = Stream.ORDER, part: int = 0
) -> np.ndarray:
    """Where the positions go in a random permutation of [0, num_samples): int64, a function of its arguments only.

    Swap-or-not (Hoang, Morris and Rogaway, CRYPTO 2012): in each round position x and its partner K - x are exchanged
    or not, by one hashed bit of the pair. A bijection for every num_samples, without walking cycles. Two positions keep
    their distance only if they are exchanged in the same rounds: with 24 rounds, one pair in 2^24.

    Args:
        positions: int64 in [0, num_samples).
        part: another number is another permutation.
    """
    pivots, keys = _round_keys(num_samples, seed % 2**64, epoch, int(stream), part)
    x = positions.astype(np.int64)
    for pivot, key in zip(pivots, keys, strict=True):
        partner = pivot - x
        partner += (partner < 0) * num_samples
        word = np.maximum(x, partner).view(np.uint64) ^ key  # the same for both of a pair
        word *= _MIX_1
        word ^= word >> np.uint64(29)
        word *= _MIX_2
        x = np.where(word.view(np.int64) < 0, partner, x)
    return x


@lru_cache(maxsize=64)
def _round_keys(num_samples: int, seed: int, epoch: int, stream: int, part: int) -> tuple[np.ndarray, np.ndarray]:
    """A pivot in [0, num_samples) and a 64-bit key for each round (numpy guarantees a bit generator's raw words)."""
    key = np.array([seed, stream], np.uint64)  # a list would become floating point where the seed has its highest bit
    words = np.random.Philox(key=key, counter=[0, epoch, part, 0]).random_raw(2 * _ROUNDS)
    return (words[:_ROUNDS] % np.uint64(num_samples)).astype(np.int64), words[_ROUNDS:]


class SampleOrder:
    """The endless stream of one source: epoch after epoch, each in its own order.

    With `block` the order is kind to disks that read on faster than they seek: the source is cut into blocks of
    neighbouring samples, the blocks are shuffled, and samples are shuffled within windows of `window` blocks.

    Args:
        num_samples: samples in an epoch.
        seed: a different seed is a different stream.
        shuffle: False keeps the source's order in each epoch.
        stream: who draws; two orders under one seed need different ones.
        block: samples in a block; 0 shuffles all samples.
        window: blocks among which samples are mixed.
    """

    def __init__(
        self, num_samples: int, seed: int = 0, shuffle: bool = True, stream: int = Stream.ORDER, block: int = 0,
        window: int = BLOCKS_IN_WINDOW,
    ) -> None:  # fmt: skip
        if num_samples < 1:
            raise ValueError("cannot order an empty source: it has no samples")
        self.num_samples, self.seed, self.shuffle, self.stream = num_samples, seed, shuffle, stream
        self.block, self.window = block, window

    @property
    def epoch_length(self) -> int:
        """Stream positions after which every sample has come once."""
        return self.num_samples

    def at(self, start: int, stop: int) -> Key:
        """Samples and epochs, both (stop - start,) int64, at stream positions start … stop - 1."""
        epochs, places = np.divmod(np.arange(start, stop, dtype=np.int64), self.num_samples)
        samples = places.copy()
        for epoch in range(start // self.num_samples, -(-stop // self.num_samples)) if self.shuffle else ():
            now = epochs == epoch
            samples[now] = self._of_epoch(epoch, places[now])
        return samples, epochs

    def _of_epoch(self, epoch: int, places: np.ndarray) -> np.ndarray:
        numbers = (self.seed, epoch, self.stream)
        if not self.block:
            return shuffled(places, self.num_samples, *numbers)
        blocks = self.num_samples // self.block  # whole ones; the rest stays at the end, in the last window
        size, last = self.window * self.block, max(blocks // self.window, 1) - 1
        windows = np.minimum(places // size, last)
        for window in np.unique(windows).tolist():
            here, start = windows == window, window * size
            length = size if window < last else self.num_samples - start
            places[here] = start + shuffled(places[here] - start, length, *numbers, part=1 + window)
        whole = places < blocks * self.block
        block, inside = np.divmod(places[whole], self.block)
        if blocks:
            places[whole] = shuffled(block, blocks, *numbers) * self.block + inside
        return places


class MixedOrder:
    """Real and generated samples interleaved at a fixed ratio, each from its own stream.

    Position p is generated where floor((p+1) r) > floor(p r), so *every* run of B positions, hence every micro-batch,
    holds r B generated samples up to rounding. The epoch is that of the real samples: after `epoch_length` positions
    each real one has come once. Generated samples are numbered after the real ones and count their own epochs.

    Args:
        num_real, num_generated: sizes of the two sources.
        block, window: of the real samples, see SampleOrder.
        ratio: generated part, in (0, 1); 0.7 is 7 generated to 3 real (Wang et al. 2023).
    """

    def __init__(
        self, num_real: int, num_generated: int, ratio: float, seed: int = 0, block: int = 0,
        window: int = BLOCKS_IN_WINDOW,
    ) -> None:  # fmt: skip
        self.real = SampleOrder(num_real, seed, block=block, window=window)
        self.generated = SampleOrder(num_generated, seed, stream=Stream.MIX)
        # A fraction, not a float: positions grow past 2^32 and 0.7 p would round differently there.
        self.ratio = Fraction(ratio).limit_denominator(1000)
        if not 0 < self.ratio < 1:
            raise ValueError(f"the generated ratio must lie in [0.001, 0.999], got {ratio}")
        self.num_samples, self.seed = num_real, seed

    @property
    def block(self) -> int:
        """Samples in a block of the real source; 0 where all of it is shuffled."""
        return self.real.block

    @property
    def epoch_length(self) -> int:
        """Stream positions after which every real sample has come once."""
        share = 1 - self.ratio
        return -(-self.num_samples * share.denominator // share.numerator)

    def at(self, start: int, stop: int) -> Key:
        """Samples and epochs, both (stop - start,) int64, at stream positions start … stop - 1."""
        edges = np.arange(start, stop + 1, dtype=np.int64) * self.ratio.numerator // self.ratio.denominator
        is_generated = np.diff(edges) > 0
        generated_start, generated_stop = int(edges[0]), int(edges[-1])
        samples, epochs = np.empty(stop - start, np.int64), np.empty(stop - start, np.int64)
        samples[~is_generated], epochs[~is_generated] = self.real.at(start - generated_start, stop - generated_stop)
        samples[is_generated], epochs[is_generated] = self.generated.at(generated_start, generated_stop)
        samples[is_generated] += self.num_samples
        return samples, epochs


@dataclass(frozen=True)
class Cursor:
    """How far a loader has come: the stream position of the global batch, and the micro-batches of it already taken."""

    position: int = 0
    micro_step: int = 0


@dataclass(frozen=True)
class BatchPlan:
    """How the stream is cut into global batches and these into the ranks' micro-batches.

    Attributes:
        batch_size: samples in one rank's micro-batch.
        rank, world_size: this process among all.
        accum_iter: micro-batches a rank takes for one optimiser step.
        stop: stream position of the end; None is an endless stream. The last global batch of a finite one is dealt out
            evenly, so ranks differ by at most one sample.
        total: the global batch where its parts are not all as large (2048 over 7 ranks): they differ by one sample,
            and `batch_size` is the larger of them. None: all are `batch_size`.
    """

    batch_size: int
    rank: int = 0
    world_size: int = 1
    accum_iter: int = 1
    stop: int | None = None
    total: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "world_size", "accum_iter"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must lie in [0, {self.world_size}), got {self.rank}")
        if self.stop is not None and self.accum_iter > 1:
            raise ValueError(f"accum_iter must be 1 in a stream with an end, got {self.accum_iter}")

    @property
    def global_batch(self) -> int:
        """Samples of one optimiser step over all ranks."""
        return self.total or self.batch_size * self.world_size * self.accum_iter

    def span(self, cursor: Cursor) -> tuple[int, int]:
        """Stream positions [start, stop) of this rank's next micro-batch; empty at a short end."""
        length = self.global_batch if self.stop is None else min(self.global_batch, self.stop - cursor.position)
        parts, part = self.world_size * self.accum_iter, self.rank * self.accum_iter + cursor.micro_step
        return cursor.position + length * part // parts, cursor.position + length * (part + 1) // parts

    def advance(self, cursor: Cursor, count: int = 1) -> Cursor:
        """The cursor `count` micro-batches of this rank later."""
        steps, micro_step = divmod(cursor.micro_step + count, self.accum_iter)
        return Cursor(cursor.position + steps * self.global_batch, micro_step)

    def is_over(self, cursor: Cursor) -> bool:
        """True past the end of a finite stream."""
        return self.stop is not None and cursor.position >= self.stop


@dataclass(frozen=True)
class KeyStream:
    """This rank's micro-batches from a cursor on: `keys[n]` says what the n-th holds; IndexError is the end.

    It holds a few numbers and remembers nothing, so every process that reads ahead can have its own.
    """

    order: "SampleOrder | MixedOrder"
    plan: BatchPlan
    cursor: Cursor = Cursor()

    def __getitem__(self, number: int) -> Key:
        span = self._span(number)
        if span is None:
            raise IndexError(f"the stream has no micro-batch {number}")
        return self.order.at(*span)

    def __iter__(self) -> Iterator[Key]:
        for number in itertools.count():
            if not self.has(number):
                return
            yield self[number]

    def _span(self, number: int) -> tuple[int, int] | None:
        cursor = self.plan.advance(self.cursor, number)
        start, stop = (0, 0) if self.plan.is_over(cursor) else self.plan.span(cursor)
        return (start, stop) if start < stop else None  # past the end, or this rank's share of the last batch is empty

    def has(self, number: int) -> bool:
        """Whether the stream reaches this micro-batch."""
        return self._span(number) is not None

    def after(self, count: int) -> "KeyStream":
        """The same stream without its first `count` micro-batches."""
        return replace(self, cursor=self.plan.advance(self.cursor, count))


def micro_batch_size(global_batch: int, world_size: int, accum_iter: int = 1) -> int:
    """Each rank's micro-batch for a wanted global batch.

    Raises:
        ValueError: the ranks and accumulation steps do not divide the global batch.
    """
    parts = world_size * accum_iter
    if global_batch < 1 or global_batch % parts:
        lower = max(global_batch // parts, 1) * parts
        raise ValueError(
            f"a global batch of {global_batch} does not divide over {world_size} ranks x {accum_iter} accumulation "
            f"steps; use a global batch of {lower} or {lower + parts}, or another number of ranks (torchrun "
            "--nproc_per_node) or --accum_iter"
        )
    return global_batch // parts
