"""Which sample comes when: the training stream as a function of (seed, position).

The stream is the concatenation of the epochs' permutations. Global batch s is the positions [s G, (s+1) G): a batch may
straddle two epochs, so nothing is dropped and every sample comes exactly once an epoch. A global batch is cut into
`world_size * accum_iter` micro-batches; rank r works on `accum_iter` neighbouring ones. So what a micro-batch holds
depends on neither the rank count nor whether the step was split over ranks or over accumulation.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from mimir_fast.philox import Stream


def permutation(num_samples: int, seed: int, epoch: int, stream: int = Stream.ORDER) -> np.ndarray:
    """(num_samples,) uint32: the order of one epoch, a function of its arguments only.

    Sorts Philox words whose low bits are replaced by the sample index. numpy guarantees a bit generator's raw words
    across versions (not its `permutation`), the index breaks ties the same way everywhere, and sorting values is
    several times faster than argsort: 14 million samples take about a second.
    """
    bits = max(num_samples - 1, 1).bit_length()
    generator = np.random.Philox(key=[seed & (2**64 - 1), int(stream)], counter=[0, epoch, 0, 0])
    keys = generator.random_raw(num_samples) << np.uint64(bits)
    keys |= np.arange(num_samples, dtype=np.uint64)
    keys.sort()
    return (keys & np.uint64(2**bits - 1)).astype(np.uint32)


class SampleOrder:
    """The endless stream of one source: epoch after epoch, each in its own order.

    Args:
        num_samples: samples in an epoch.
        seed: a different seed is a different stream.
        shuffle: False keeps the source's order in each epoch.
        stream: who draws; two orders under one seed need different ones.
    """

    def __init__(self, num_samples: int, seed: int = 0, shuffle: bool = True, stream: int = Stream.ORDER) -> None:
        if num_samples < 1:
            raise ValueError("cannot order an empty source: it has no samples")
        self.num_samples, self.seed, self.shuffle, self.stream = num_samples, seed, shuffle, stream
        self._epochs: dict[int, np.ndarray] = {}

    @property
    def epoch_length(self) -> int:
        """Stream positions after which every sample has come once."""
        return self.num_samples

    def at(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples and epochs, both (stop - start,) int64, at stream positions start … stop - 1."""
        pieces = []
        position = start
        while position < stop:
            epoch, offset = divmod(position, self.num_samples)
            count = min(stop - position, self.num_samples - offset)
            pieces.append((self._samples(epoch)[offset : offset + count], np.full(count, epoch)))
            position += count
        if not pieces:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        samples, epochs = (np.concatenate(columns).astype(np.int64) for columns in zip(*pieces, strict=True))
        return samples, epochs

    def _samples(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            epoch = 0
        if epoch not in self._epochs:
            # Two are enough: a batch sees the end of one epoch and the start of the next.
            while len(self._epochs) > 1:
                self._epochs.pop(min(self._epochs))
            order = permutation(self.num_samples, self.seed, epoch, self.stream) if self.shuffle else None
            self._epochs[epoch] = np.arange(self.num_samples, dtype=np.uint32) if order is None else order
        return self._epochs[epoch]


class MixedOrder:
    """Real and generated samples interleaved at a fixed ratio, each from its own stream.

    Position p is generated where floor((p+1) r) > floor(p r), so *every* run of B positions, hence every micro-batch,
    holds r B generated samples up to rounding. The epoch is that of the real samples: after `epoch_length` positions
    each real one has come once. Generated samples are numbered after the real ones and count their own epochs.

    Args:
        num_real, num_generated: sizes of the two sources.
        ratio: generated part, in (0, 1); 0.7 is 7 generated to 3 real (Wang et al. 2023).
    """

    def __init__(self, num_real: int, num_generated: int, ratio: float, seed: int = 0) -> None:
        self.real = SampleOrder(num_real, seed)
        self.generated = SampleOrder(num_generated, seed, stream=Stream.MIX)
        # A fraction, not a float: positions grow past 2^32 and 0.7 p would round differently there.
        self.ratio = Fraction(ratio).limit_denominator(1000)
        if not 0 < self.ratio < 1:
            raise ValueError(f"the generated ratio must lie in [0.001, 0.999], got {ratio}")
        self.num_samples, self.seed = num_real, seed

    @property
    def epoch_length(self) -> int:
        """Stream positions after which every real sample has come once."""
        share = 1 - self.ratio
        return -(-self.num_samples * share.denominator // share.numerator)

    def at(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
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

    def spans(self, cursor: Cursor) -> Iterator[tuple[int, int]]:
        """This rank's non-empty micro-batches from `cursor` on, as stream positions."""
        while not self.is_over(cursor):
            start, stop = self.span(cursor)
            cursor = self.advance(cursor)
            if stop > start:
                yield start, stop


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
