"""What all this costs a step: the housekeeping after it, and a save beside training against one that is waited for.

python tests/chaos/overhead.py [--encoder base]
torchrun --standalone --nproc_per_node 2 tests/chaos/overhead.py
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

import torch

from mimir_fast.checkpoints.reading import verify
from mimir_fast.checkpoints.saving import Saver
from mimir_fast.models.masked_model import ModelConfig, build_masked_model
from mimir_fast.recipes import find_recipe
from mimir_fast.training.agreement import Agreement
from mimir_fast.training.ema import Ema
from mimir_fast.training.optimizer import OptimizerConfig, build_optimizer
from mimir_fast.training.pretraining import PretrainConfig
from mimir_fast.training.state import training_tensors
from mimir_fast.training.watchdog import Watchdog
from mimir_fast.world import World, start_world, stop_world

STEP = 0.1  # seconds of a step that housekeeping is compared with: a fast one
SAVES = 4


def housekeeping(world: World) -> float:
    """Seconds after each step, with the all-reduce of those steps that have one spread over all."""
    watchdog, agreement = Watchdog(world, None, 15), Agreement(world, 0)
    spent = 0.0
    for step in range(1, 41):
        time.sleep(STEP)
        started = time.perf_counter()
        watchdog.beat(step)
        agreement.ask(step, stop=False, save=False)
        spent += time.perf_counter() - started
    watchdog.close()
    return spent / 40


@dataclass
class Save:
    """Of a training state with moving average: GB; seconds a save blocks, is under way, and of its checksums.

    Attributes:
        beside: how much longer a step takes while a save is under way, 0.01 for a hundredth.
    """

    size: float
    blocks: float
    whole: float
    checksums: float
    beside: float


def steps_until(over: Callable[[], bool]) -> list[float]:
    """Seconds of each of some products on one core; the other cores are left to who works beside it."""
    threads, seconds = torch.get_num_threads(), []
    torch.set_num_threads(1)
    while not over():
        started = time.perf_counter()
        product = torch.ones(768, 768)
        for _ in range(10):
            product = product @ product / 768
        seconds.append(time.perf_counter() - started)
    torch.set_num_threads(threads)
    return seconds


def saving(world: World, encoder: str) -> Save:
    """A training state is saved some times, with steps beside it."""
    model = build_masked_model(ModelConfig(encoder=encoder), 224)
    optimizer = build_optimizer(model, OptimizerConfig())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    tensors = training_tensors(model, optimizer, Ema(model, 0.99))
    saver, blocked, whole, checksums, beside = Saver(world), [], [], [], []
    countdown = iter(range(50))
    alone = steps_until(lambda: next(countdown, None) is None)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "step-00000001"
        for number in range(SAVES):
            started = time.perf_counter()
            saver.start(checkpoint, tensors, {"step": number})
            blocked.append(time.perf_counter() - started)
            beside += steps_until(saver.done)
            saver.wait()
            whole.append(time.perf_counter() - started)
            started = time.perf_counter()
            verify(checkpoint)
            checksums.append(time.perf_counter() - started)
    saver.close()
    # The first makes the copy's memory; afterwards it is reused.
    size = sum(t.numel() * t.element_size() for t in tensors.values()) / 1e9
    share = fmean(beside) / median(alone) - 1
    return Save(size, median(blocked[1:]), median(whole[1:]), median(checksums[1:]), share)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="base")
    encoder = parser.parse_args().encoder
    world = start_world("cpu")
    seconds = housekeeping(world)
    if world.is_main:
        print(f"housekeeping {1e6 * seconds:.0f} us a step on {world.size} ranks, {seconds / STEP:.3%} of {STEP} s")
    if world.size == 1:
        save = saving(world, encoder)
        print(
            f"save of ViT-{encoder}, {save.size:.2f} GB: blocks {save.blocks:.3f} s, {save.blocks / save.whole:.1%} of "
            f"the {save.whole:.3f} s until it is whole (of which checksums {save.checksums:.3f} s); steps beside it "
            f"take {save.beside:.1%} longer"
        )
        often = find_recipe(PretrainConfig, "imagenet/mimir_vit_base").run.save_every
        for length, every in ((STEP, often), (1.0, often), (STEP, round(15 * 60 / STEP))):
            share = (seconds + (save.blocks + save.beside * min(save.whole, every * length)) / every) / length
            print(f"all together, of steps of {length} s and a save every {every}: {share:.3%}")
    stop_world()


if __name__ == "__main__":
    main()
