"""A trace of some steps, to be looked at in a browser."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mimir_fast.world import World


@contextmanager
def profiled(num_steps: int, folder: Path, world: World) -> Iterator[Callable[[], None]]:
    """Yields what is to be called after each step; `num_steps` after the second one are recorded, on each rank."""
    if num_steps == 0:
        yield lambda: None
        return
    from torch.profiler import ProfilerActivity, profile, schedule

    def write(found: profile) -> None:
        key = "self_device_time_total" if world.device.type == "cuda" else "self_cpu_time_total"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            found.export_chrome_trace(str(folder / f"rank-{world.rank}.json.gz"))
            (folder / f"rank-{world.rank}.txt").write_text(found.key_averages().table(sort_by=key, row_limit=40))
        except (OSError, RuntimeError) as error:  # a trace is not worth a run
            print(f"WARNING: no trace of rank {world.rank}: {error}", file=sys.stderr, flush=True)

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    plan = schedule(wait=1, warmup=1, active=num_steps, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write) as running:
        yield running.step
