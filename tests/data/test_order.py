"""The training stream: every sample once an epoch, whatever the rank count; nothing dropped at an epoch's end."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimir_fast.data.order import (
    BatchPlan,
    Cursor,
    KeyStream,
    MixedOrder,
    SampleOrder,
    micro_batch_size,
    shuffled,
)


def stream(order, plan, steps, cursor=None):
    """(steps * accum_iter, batch) samples of one rank, and the cursor after them."""
    cursor, rows = cursor or Cursor(), []
    for _ in range(steps * plan.accum_iter):
        rows.append(order.at(*plan.span(cursor))[0])
        cursor = plan.advance(cursor)
    return np.stack(rows), cursor


def permutation(num, seed=0, epoch=0, **options):
    return shuffled(np.arange(num), num, seed, epoch, **options)


@given(num=st.integers(1, 300), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 10_000))
@settings(deadline=None, max_examples=50)
def test_a_permutation_holds_every_sample_once(num, seed, epoch):
    assert sorted(permutation(num, seed, epoch)) == list(range(num))


def test_a_part_of_a_permutation_costs_only_that_part():
    """No list of all samples: a place in an epoch of 2^50 samples is found at once."""
    whole = permutation(1000)
    assert (shuffled(np.arange(300, 310), 1000, 0, 0) == whole[300:310]).all()
    far = shuffled(np.array([0, 2**50 - 1]), 2**50, 0, 0)
    assert (far >= 0).all() and (far < 2**50).all()


def test_permutations_differ_by_epoch_seed_and_part_and_are_uniform():
    first = permutation(1000)
    assert (first == permutation(1000)).all()
    for other in ({"epoch": 1}, {"seed": 1}, {"part": 1}, {"stream": 6}):
        assert (first == permutation(1000, **other)).mean() < 0.02
    counts, orders = np.zeros((4, 4)), set()
    for epoch in range(4000):
        order = permutation(4, epoch=epoch)
        counts[order, np.arange(4)] += 1
        orders.add(tuple(order))
    assert np.abs(counts / 4000 - 0.25).max() < 0.03  # each sample at each place: 4.4 standard deviations
    assert len(orders) == 24  # odd and even ones


def test_neighbours_are_parted():
    order = permutation(100_000)
    assert (np.abs(np.diff(order)) == 1).sum() < 12  # 2 are expected
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.02


def test_the_order_never_changes():
    """A resumed run must see the old order, so these values are part of the format."""
    assert permutation(8).tolist() == [4, 2, 7, 6, 1, 0, 3, 5]
    assert SampleOrder(1000, seed=3, block=4).at(0, 4)[0].tolist() == [813, 70, 855, 64]


@given(num=st.integers(1, 700), block=st.integers(1, 9), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_blocks_hold_every_sample_once(num, block, seed, epoch):
    samples, epochs = SampleOrder(num, seed, block=block).at(epoch * num, (epoch + 1) * num)
    assert sorted(samples) == list(range(num)) and (epochs == epoch).all()


def test_blocks_are_read_a_window_at_a_time():
    """64 blocks of 4 make a window: it touches 64 runs of neighbours, and another epoch touches other ones."""
    order = SampleOrder(10_000, block=4)
    windows = [set(order.at(start, start + 256)[0] // 4) for start in (0, 256, 10_000)]
    assert all(len(window) == 64 for window in windows)
    assert not windows[0] & windows[1] and len(windows[0] & windows[2]) < 16
    first = order.at(0, 256)[0]
    assert (np.diff(first) == 1).mean() < 0.1  # shuffled within the window


def test_a_key_stream_is_the_plan_and_the_order():
    keys = KeyStream(SampleOrder(10, seed=1), BatchPlan(4, stop=10))
    assert [key[0].tolist() for key in keys] == [SampleOrder(10, seed=1).at(*span)[0].tolist() for span in
                                                 ((0, 4), (4, 8), (8, 10))]  # fmt: skip
    assert (keys.after(1)[0][0] == keys[1][0]).all() and keys.has(2) and not keys.has(3)
    with pytest.raises(IndexError, match="no micro-batch 3"):
        keys[3]
    ends = [list(KeyStream(SampleOrder(2), BatchPlan(1, rank, 4, stop=2))) for rank in range(4)]
    assert sorted(len(keys) for keys in ends) == [0, 0, 1, 1]  # a rank's share can be empty


@given(
    num=st.integers(1, 60),
    batch=st.integers(1, 7),
    world=st.sampled_from([1, 2, 3, 4]),
    accum=st.integers(1, 3),
    epochs=st.integers(1, 3),
)
@settings(deadline=None, max_examples=100)
def test_every_sample_once_an_epoch_over_all_ranks(num, batch, world, accum, epochs):
    """Also when a batch straddles two epochs, and when it holds several."""
    seen = np.zeros((epochs, num), int)
    for rank in range(world):
        order, plan = SampleOrder(num, seed=3), BatchPlan(batch, rank, world, accum)
        cursor = Cursor()
        while cursor.position < epochs * num:
            for sample, epoch in zip(*order.at(*plan.span(cursor)), strict=True):
                if epoch < epochs:
                    seen[epoch, sample] += 1
            cursor = plan.advance(cursor)
    assert (seen == 1).all()


@pytest.mark.parametrize(("world", "accum"), [(1, 4), (2, 2), (4, 1)])
def test_a_global_batch_does_not_depend_on_how_it_is_split(world, accum):
    whole, _ = stream(SampleOrder(50, seed=1), BatchPlan(12), steps=9)
    parts = [stream(SampleOrder(50, seed=1), BatchPlan(3, rank, world, accum), steps=9)[0] for rank in range(world)]
    by_step = np.concatenate([part.reshape(9, accum * 3) for part in parts], axis=1)
    assert (by_step == whole).all()


def test_advancing_by_many_is_advancing_one_by_one():
    plan, cursor = BatchPlan(2, 1, 3, 4), Cursor(48, 3)
    for count in range(9):
        assert plan.advance(Cursor(48, 3), count) == cursor
        cursor = plan.advance(cursor)


@given(num=st.integers(1, 60), batch=st.integers(1, 9), world=st.sampled_from([1, 2, 3, 4]))
@settings(deadline=None, max_examples=100)
def test_a_finite_pass_deals_out_every_position_once_and_evenly(num, batch, world):
    spans = []
    for rank in range(world):
        plan, cursor, mine = BatchPlan(batch, rank, world, stop=num), Cursor(), 0
        while not plan.is_over(cursor):
            start, stop = plan.span(cursor)
            assert stop - start <= batch
            spans += list(range(start, stop))
            mine += stop - start
            cursor = plan.advance(cursor)
        assert abs(mine - num / world) <= 1
    assert sorted(spans) == list(range(num))


@given(
    real=st.integers(2, 40),
    generated=st.integers(2, 90),
    ratio=st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.8, 0.95]),
    start=st.integers(0, 10**6),
    batch=st.integers(1, 64),
)
@settings(deadline=None, max_examples=100)
def test_every_batch_holds_the_ratio_of_generated_samples(real, generated, ratio, start, batch):
    samples, _ = MixedOrder(real, generated, ratio, seed=0).at(start, start + batch)
    assert abs((samples >= real).sum() - ratio * batch) <= 1
    assert samples.max() < real + generated


def test_mixing_keeps_the_real_epoch():
    order = MixedOrder(num_real=30, num_generated=50, ratio=0.7, seed=0)
    assert order.epoch_length == 100
    samples, epochs = order.at(0, 200)
    for epoch in (0, 1):
        assert sorted(samples[(samples < 30) & (epochs == epoch)]) == list(range(30))
        assert sorted(samples[(samples >= 30) & (epochs == epoch)])[:50] == list(range(30, 80))
    plain, _ = SampleOrder(30, seed=0).at(0, 60)
    assert (samples[samples < 30] == plain).all()  # the real stream is what it is without mixing


def test_mixing_is_exact_far_into_the_run():
    order = MixedOrder(1000, 1000, 0.7, seed=0)
    samples, _ = order.at(10**13, 10**13 + 10_000)
    assert (samples >= 1000).sum() == 7000


def test_world_size_that_does_not_divide_the_batch_is_refused_with_the_fix():
    assert micro_batch_size(512, world_size=4, accum_iter=2) == 64
    with pytest.raises(ValueError, match=r"510 or 513.*--accum_iter"):
        micro_batch_size(512, world_size=3)
    with pytest.raises(ValueError, match="use a global batch of 4"):
        micro_batch_size(2, world_size=4)


@pytest.mark.parametrize("bad", [{"rank": 2, "world_size": 2}, {"batch_size": 0}, {"accum_iter": 0}])
def test_an_impossible_plan_is_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        BatchPlan(**{"batch_size": 4, **bad})


def test_an_empty_source_is_refused():
    with pytest.raises(ValueError, match="no samples"):
        SampleOrder(0)
