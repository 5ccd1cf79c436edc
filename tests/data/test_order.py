"""The training stream: every sample once an epoch, whatever the rank count; nothing dropped at an epoch's end."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimir_fast.data.order import BatchPlan, Cursor, MixedOrder, SampleOrder, micro_batch_size, permutation


def stream(order, plan, steps, cursor=None):
    """(steps * accum_iter, batch) samples of one rank, and the cursor after them."""
    cursor, rows = cursor or Cursor(), []
    for _ in range(steps * plan.accum_iter):
        rows.append(order.at(*plan.span(cursor))[0])
        cursor = plan.advance(cursor)
    return np.stack(rows), cursor


@given(num=st.integers(1, 300), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 10_000))
@settings(deadline=None, max_examples=50)
def test_a_permutation_holds_every_sample_once(num, seed, epoch):
    assert sorted(permutation(num, seed, epoch)) == list(range(num))


def test_permutations_differ_by_epoch_and_seed_and_are_uniform():
    first = permutation(1000, 0, 0)
    assert (first == permutation(1000, 0, 0)).all()
    assert (first == permutation(1000, 0, 1)).mean() < 0.02
    assert (first == permutation(1000, 1, 0)).mean() < 0.02
    counts = np.zeros((4, 4))
    for epoch in range(4000):
        counts[permutation(4, 0, epoch), np.arange(4)] += 1
    assert np.abs(counts / 4000 - 0.25).max() < 0.03  # each sample at each place: 4.4 standard deviations


def test_the_order_never_changes():
    """A resumed run must see the old order, so these values are part of the format."""
    assert permutation(8, seed=0, epoch=0).tolist() == [7, 5, 2, 3, 4, 0, 6, 1]


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
