"""Training images that are kept aside: never trained on, never of the test split."""

from dataclasses import replace

import numpy as np
import pytest

from mimir_fast.data import DataConfig, build_loader, build_source
from mimir_fast.data.sources.base import hold_out

DIGITS = DataConfig(source="digits", image_size=8, channels=1)


@pytest.mark.parametrize(("total", "count", "held"), [(1497, 512, 149), (50_000, 512, 512), (9, 5, 0), (100, 0, 0)])
def test_two_parts_make_the_whole(total: int, count: int, held: int) -> None:
    rest, kept = hold_out(np.random.default_rng(0).integers(10, size=total), count)
    assert len(kept) == held and np.array_equal(np.sort(np.concatenate([rest, kept])), np.arange(total))
    if held > 1:
        gaps = np.diff(kept)
        assert gaps.max() - gaps.min() <= 1, "evenly spaced"


def test_classes_that_take_turns_are_kept_aside_evenly() -> None:
    labels = np.arange(1000) % 10
    assert np.bincount(labels[hold_out(labels, 100)[1]]).tolist() == [10] * 10, "not one class a hundred times"


def test_sources_split_without_sharing_an_image() -> None:
    asked = replace(DIGITS, hold_out=100)
    whole, train, held = (build_source(c, s) for c, s in ((DIGITS, "train"), (asked, "train"), (asked, "held_out")))
    assert (len(whole), len(train), len(held)) == (1497, 1397, 100)
    rest, kept = hold_out(whole.labels, 100)
    assert all(np.array_equal(train.pixels(i), whole.pixels(int(rest[i]))) for i in (0, 700, 1396))
    assert all(np.array_equal(held.pixels(i), whole.pixels(int(kept[i]))) for i in (0, 50, 99))
    assert len(build_source(asked, "test")) == 300, "the test split is whole"
    assert len(build_source(replace(asked, limit=64), "train")) == 64


def test_a_loader_of_the_held_out_images_is_one_pass_in_order() -> None:
    asked = replace(DIGITS, hold_out=30)
    batches = list(build_loader(asked, split="held_out", batch_size=16))
    assert [len(batch.labels) for batch in batches] == [16, 14]
    labels = np.concatenate([batch.labels.numpy() for batch in batches])
    assert np.array_equal(labels, build_source(asked, "held_out").labels)
