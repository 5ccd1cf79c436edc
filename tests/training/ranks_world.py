"""Run by test_world.py: two ranks agree, fail and save together. Prints one JSON line a rank."""

import json
import os
import resource
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch
from small_models import masked_vit
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mimir_fast.attacks.reconstruction import ReconstructionAttackConfig
from mimir_fast.checkpoints.reading import load_checkpoint, read_meta, verify
from mimir_fast.checkpoints.saving import Saver
from mimir_fast.data.batch import Batch
from mimir_fast.layers.borrowing import borrowed, training_pass, unwrap
from mimir_fast.layers.inspection import calls
from mimir_fast.methods.adv_mae import AdvMae, AdvMaeConfig
from mimir_fast.methods.mimir import Mimir, MimirConfig
from mimir_fast.methods.mutual_information import MutualInformationConfig
from mimir_fast.models.masked_model import View
from mimir_fast.pretrain import config_from
from mimir_fast.training.agreement import MAX_STEPS, Agreement
from mimir_fast.training.distributed import parallelize
from mimir_fast.training.meter import Meter
from mimir_fast.training.run_folder import RunFolder
from mimir_fast.training.statistics import StatisticsGuard
from mimir_fast.world import start_world, stop_world

found: dict[str, object] = {}
folder = Path(sys.argv[1])
rank = int(os.environ["RANK"])
# A file of bytecode that is cut short by the limit below would break every later import.
sys.dont_write_bytecode = True
sys.excepthook = lambda *error: (traceback.print_exception(*error), os._exit(1))[0]  # the other one must not wait
world = start_world("cpu")


def failing(on: int) -> int:
    if rank == on:
        raise FileExistsError(f"rank {on} cannot")
    return rank


def said(fn: object) -> str:
    try:
        fn()  # type: ignore[operator]
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


found["together"] = world.together(lambda: rank * 10)
found["on_main"] = world.on_main(lambda: f"said by {rank}")
found["main fails"] = said(lambda: world.on_main(lambda: failing(0)))
found["the other fails"] = said(lambda: world.together(lambda: failing(1)))

# A folder each host has for itself.
private = RunFolder(folder / f"host{rank}" / "run", world)
found["not shared"] = said(lambda: private.open(config_from([]), resume=True, overwrite=False, allow_changes=False))
private.close()

# Another command line on one rank.
mixed = RunFolder(folder / "mixed", world)
line = ["--lr", "0.001" if rank == 0 else "0.005", "--data.num_workers", str(rank)]
found["mixed"] = said(lambda: mixed.open(config_from(line), resume=True, overwrite=False, allow_changes=False))
mixed.close()
found["mixed folder"] = mixed.path.exists()

# One rank is told to stop in step 3; both stop after the same step.
agreement, step, stopping = Agreement(world, 0), 0, False
while not stopping and step < 10 * MAX_STEPS:
    step += 1
    time.sleep(0.05)
    stopping, _ = agreement.ask(step, stop=rank == 1 and step >= 3, save=False)
found["stopped at"], found["asked"] = step, agreement.rounds

# A save in which the second rank cannot write fails on both; the next one works and holds the halves of both.
saver = Saver(world)
tensors = {f"model/{i}": torch.full((64, 8), float(i)) for i in range(4)}
(folder / "checkpoints").mkdir(exist_ok=True)


def save(name: str, poison: bool) -> str:
    """What went wrong. Poisoned: the second rank may write files of 64 bytes only, as if its disk were full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def run() -> None:
        saver.start(folder / "checkpoints" / name, tensors, {"step": 1})
        saver.wait()

    if poison and rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        return said(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


found["poisoned save"] = save("step-00000001", poison=True)
found["next save"] = save("step-00000002", poison=False)
verify(folder / "checkpoints" / "step-00000002")
found["files"] = len(read_meta(folder / "checkpoints" / "step-00000002")["files"])
for tensor in tensors.values():
    tensor.zero_()
load_checkpoint(folder / "checkpoints" / "step-00000002", tensors)
found["loaded"] = [t.mean().item() for t in tensors.values()]


# Ranks that saw different batches keep one and the same statistics: the mean.
norm = nn.BatchNorm1d(2)
guard = StatisticsGuard(norm)
guard.before_step()
norm(torch.tensor([[0.0, 0.0], [2.0, 4.0]]) * (1 + rank))
guard.after_step(torch.tensor(True))
found["statistics"] = [norm.running_mean.tolist(), norm.running_var.tolist()]


# The first rank trains on more lost files, the second waits for data: what is logged is of all.
loader = SimpleNamespace(wait_seconds=0.0, skipped=["a", "b"][rank:])
meter = Meter(32, world, loader)  # type: ignore[arg-type]
for value in (1.0, 3.0):
    meter.add({"loss": torch.tensor(value + 10 * rank)})
time.sleep(0.2)
loader.wait_seconds = 0.1 * rank
found["meter"] = meter.read()


# FSDP: an attack of three steps, then a training pass; how often parameters are gathered, and the gradients.
def attack_and_train(model: nn.Module, reduce: bool) -> None:
    patches = torch.linspace(0, 1, 4 * 4 * 48).view(4, 4, 48)
    ids = torch.arange(4).expand(4, 4)
    with training_pass(model, reduce):
        with borrowed(model) as module:
            for _ in range(3):
                patches = patches.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(module(View(patches, ids)).prediction.square().sum(), patches)
                patches = patches + 0.01 * gradient.sign()
        model(View(patches.detach(), ids)).prediction.square().sum().backward()


def small() -> nn.Module:
    torch.manual_seed(0)
    return masked_vit(16, 4, 3, 32, 2, 2, 16, 1, 2)


def gradients(model: nn.Module) -> list[torch.Tensor]:
    whole = [p.grad for p in model.parameters() if p.grad is not None]
    return [g.full_tensor() if hasattr(g, "full_tensor") else g for g in whole]


class Collectives(TorchDispatchMode):
    """Counts c10d's operators by name. CommDebugMode cannot: its hooks do not go with an attack's autograd.grad."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "c10d":
            self.counts[func._schema.name.split("::")[1]] += 1
        return func(*args, **(kwargs or {}))


def compare(**options: object) -> dict[str, object]:
    reference = small()
    for _ in range(3):
        attack_and_train(reference, True)
    model = parallelize(small(), "fsdp", world, bf16=False, compiled=False, **options)  # type: ignore[arg-type]
    with Collectives() as counted:
        attack_and_train(model, True)
    attack_and_train(model, False)  # accumulates
    attack_and_train(model, True)
    pairs = zip(gradients(reference), gradients(model), strict=True)
    names = dict(counted.counts)
    with borrowed(model) as module:  # outside of a training pass nothing stays behind
        module(View(torch.zeros(1, 4, 48), torch.arange(4).expand(1, 4)))
    sharded = all(hasattr(p, "full_tensor") for p in model.parameters())
    return {
        "equal": all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs),
        "counts": names,
        "sharded": sharded,
    }


found["fsdp"] = compare()
found["fsdp recomputed"] = compare(checkpoint_activations=True)
found["hsdp"] = compare(shard_ranks=1)


def residual_dtypes(strategy: str) -> dict[str, list[str]]:
    """What goes into each block and comes out, in bf16, and what the patches are embedded in."""
    model = parallelize(small(), strategy, world, bf16=True, compiled=False)  # type: ignore[arg-type]
    bare = unwrap(model)
    seen: dict[str, list[str]] = {"embedded": [], "residual": []}
    bare.encoder.patch_embed.register_forward_hook(lambda _, args, out: seen["embedded"].append(str(out.dtype)))
    for block in bare.layers():
        block.register_forward_hook(lambda _, args, out: seen["residual"].append(f"{args[0].dtype} -> {out.dtype}"))
    with torch.autocast("cpu", torch.bfloat16):
        model(View(torch.zeros(1, 4, 48), torch.arange(4).expand(1, 4))).prediction.square().sum().backward()
    return seen


found["dtypes"] = {strategy: residual_dtypes(strategy) for strategy in ("ddp", "fsdp")}


def fused(strategy: str) -> dict[str, int]:
    """How often each fused path is taken, in fp32, with an attack of three steps and a training pass."""
    os.environ["MIMIR_FAST_ATTENTION"] = "native"
    model = small() if strategy == "bare" else parallelize(small(), strategy, world, bf16=False, compiled=False)  # type: ignore[arg-type]
    before = calls.copy()
    attack_and_train(model, True)
    return dict(calls - before)


found["fused"] = {strategy: fused(strategy) for strategy in ("bare", "ddp", "fsdp")}
recorded = AdvMae(AdvMaeConfig(attack=ReconstructionAttackConfig(cuda_graph=True)))
images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
shards = parallelize(small(), "fsdp", world, bf16=False, compiled=False)
found["recorded shards"] = said(lambda: recorded(shards, Batch(images, *[torch.arange(2)] * 3), seed=0, step=0))
found["bad shards"] = said(lambda: compare(shard_ranks=3))
held = Mimir(MimirConfig(mi=MutualInformationConfig(share=0.1)))
model = parallelize(small(), "ddp", world, bf16=False, compiled=False)
generator = torch.Generator().manual_seed(rank)
for step in range(3):  # other images on each rank
    images = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8, generator=generator)
    (run,) = held.passes(model, [Batch(images, *[torch.arange(4) + 4 * rank] * 3)], seed=0, step=step)
    run()["loss"].backward()
found["penalty share"] = held.saved_state()
sys.stdout.write("RESULT " + json.dumps({"rank": rank, **found}) + "\n")
sys.stdout.flush()
stop_world()
