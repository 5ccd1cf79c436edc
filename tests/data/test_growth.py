"""A run of days must not grow: memory of each loader and its processes over 2,000 steps, as MB an hour.

Anonymous memory, whether shared with the parent or not: what a forked process shares at first becomes its own page by
page, whenever an object's reference count changes. In private memory that looks like growth (5 and 42 MB an hour of
the torch and DALI loaders), but it ends at the size of the parent. The slope is the median of all pairs': an allocator
that takes another arena makes a step, a leak a slope.

pytest -m slow tests/data/test_growth.py -s
"""

import os
from pathlib import Path

import numpy as np
import pytest

from mimir_fast.data import DataConfig, build_loader
from mimir_fast.data.prepare import PrepareConfig, prepare

STEPS, EVERY, STEPS_AN_HOUR = 2000, 20, 3600  # a step a second: ViT-B with a batch of 2048 on eight GPUs

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


def slope(x: list[int], y: list[float]) -> float:
    """The median over all pairs (Theil and Sen)."""
    return float(np.median([(y[j] - y[i]) / (x[j] - x[i]) for i in range(len(x)) for j in range(i + 1, len(x))]))


@pytest.mark.parametrize("kind", ["resident", "torch", "torch, in this process", "raw", "dali"])
def test_growth_is_less_than_a_megabyte_an_hour(image_folder, tmp_path, kind):
    if kind == "dali":
        pytest.importorskip("nvidia.dali")
    loader, _, here = kind.partition(", ")
    source, root = "folder", image_folder
    if kind == "raw":
        source, root = "raw", tmp_path / "raw"
        prepare(PrepareConfig(str(image_folder), str(root), short_side=64, num_workers=1))
    config = DataConfig(
        source=source, root=str(root), image_size=48, loader=loader, num_workers=0 if here else 2,
        augment="pad_crop" if kind == "resident" else "resized_crop",
    )  # fmt: skip
    data = build_loader(config, split="train", batch_size=4)
    steps, sizes = [], []
    for step, _ in zip(range(STEPS), data, strict=False):
        if step >= STEPS // 4 and step % EVERY == 0:  # pools and caches have filled by then
            steps.append(step)
            sizes.append(anonymous_mb())
    data.close()
    an_hour = slope(steps, sizes) * STEPS_AN_HOUR
    print(f"\n{kind}: {sizes[0]:.1f} MB, later {sizes[-1]:.1f} MB ({steps[-1] - steps[0]}): {an_hour:+.2f} MB an hour")
    assert an_hour < 1
