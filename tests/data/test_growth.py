"""A run of days must not grow: memory of each loader and its processes over 2,000 steps, as MB an hour.

Anonymous memory, whether shared with the parent or not: what a forked process shares at first becomes its own page by
page, whenever an object's reference count changes. In private memory that looks like growth (5 and 42 MB an hour of
the torch and DALI loaders), but it ends at the size of the parent. The slope is the median of all pairs' (Theil and
Sen): an allocator that takes another arena makes a step, a leak a slope.

pytest -m slow tests/data/test_growth.py -s
"""

import os
from pathlib import Path

import pytest
from scipy.stats import theilslopes

from mimir_fast.data import DataConfig, build_loader
from mimir_fast.data.prepare import prepare
from mimir_fast.data.prepare_config import PrepareConfig

STEPS, EVERY, STEPS_AN_HOUR = 2000, 20, 3600  # a step a second: ViT-B with a batch of 2048 on eight GPUs
# Pools and caches have filled by then. Each of DALI's buffers (by place in batch and queue, by thread) grows to the
# largest image it ever met: 7 MB in the first 10,000 steps of this folder, 0.4 MB in the 20,000 after them.
WARM_UP = {"dali": 10_000}

pytestmark = pytest.mark.slow


def anonymous_mb() -> float:
    """Of this process and its children: heaps and stacks, not what is mapped from files."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    total = 0
    for process in [str(os.getpid()), *children]:
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Anonymous:"):
                total += int(line.split()[1])
    return total / 1024


@pytest.mark.parametrize("kind", ["resident", "torch", "torch, in this process", "torch, shards", "raw", "dali"])
def test_growth_is_less_than_a_megabyte_an_hour(image_folder, shards, tmp_path, kind):
    if kind == "dali":
        pytest.importorskip("nvidia.dali")
    loader, _, how = kind.partition(", ")
    source, root = ("webdataset", shards) if how == "shards" else ("folder", image_folder)
    if kind == "raw":
        source, root = "raw", tmp_path / "raw"
        prepare(PrepareConfig(str(image_folder), str(root), short_side=64, num_workers=1))
    config = DataConfig(
        source=source, root=str(root), image_size=48, loader=loader, num_workers=0 if how == "in this process" else 2,
        augment="pad_crop" if kind == "resident" else "resized_crop",
    )  # fmt: skip
    data = build_loader(config, split="train", batch_size=4)
    steps, sizes = [], []
    warm_up = WARM_UP.get(kind, 500)
    for step, _ in zip(range(warm_up + STEPS), data, strict=False):
        if step >= warm_up and step % EVERY == 0:
            steps.append(step)
            sizes.append(anonymous_mb())
    data.close()
    found = theilslopes(sizes, steps, alpha=0.95)
    an_hour, low, high = (STEPS_AN_HOUR * value for value in (found.slope, found.low_slope, found.high_slope))
    print(
        f"\n{kind}: {sizes[0]:.1f} MB, {sizes[-1]:.1f} MB {steps[-1] - steps[0]} steps later: {an_hour:+.2f} "
        f"MB an hour (95 %: {low:+.2f} to {high:+.2f})"
    )
    assert an_hour < 1
