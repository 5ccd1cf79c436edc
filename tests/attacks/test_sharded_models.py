"""Attacks on models wrapped by DDP and FSDP2: gradients and their reduction are as if no attack had been.

Two gloo processes compute one training step's gradients without a PGD attack before it, with two, and with nested ones.
"""

import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from commands import run_module
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mimir_fast.attacks.pgd import cross_entropy, pgd
from mimir_fast.attacks.threat_model import LinfThreat
from mimir_fast.layers.borrowing import borrowed


def full_gradients(model: nn.Module) -> list[Tensor]:
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [g.full_tensor() if isinstance(g, DTensor) else g.clone() for g in grads]


def wrapped(strategy: str) -> nn.Module:
    """A small network, spread over the processes."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    if strategy == "ddp":
        return DistributedDataParallel(net)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (net[1], net[3]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def compare(strategy: str, images: Tensor, labels: Tensor) -> None:
    gradients = []
    for attacks in ("none", "two", "nested"):
        model = wrapped(strategy)
        for step in range(2):  # the second step accumulates on the first one's gradients
            # An attack inside an attack: the inner one must not give back what the outer one still needs.
            with borrowed(model) if attacks == "nested" else nullcontext():
                for _ in range(0 if attacks == "none" else 2):
                    adversarial = pgd(model, images, labels, LinfThreat(0.1, 0.05, 3), step=step)
                    assert (adversarial - images).abs().max() > 0.05
                whole = not any(isinstance(p, DTensor) for p in model.parameters())
                assert whole == (strategy == "ddp" or attacks == "nested"), (strategy, attacks)
            cross_entropy(model(images), labels).mean().backward()
        gradients.append(full_gradients(model))
    assert [len(found) for found in gradients] == [4, 4, 4], strategy
    for plain, after_attack, after_nested in zip(*gradients, strict=True):
        assert torch.equal(plain, after_attack) and torch.equal(plain, after_nested), strategy
    print(strategy, "compared")


def work() -> None:
    """What each of the two processes does."""
    dist.init_process_group("gloo")
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(dist.get_rank()))
    for strategy in ("ddp", "fsdp"):
        compare(strategy, images, torch.arange(4))
    dist.destroy_process_group()


def test_gradients_are_as_if_no_attack_had_been(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Path(__file__)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(here.parents[1]), os.environ.get("PYTHONPATH", "")]))
    out = run_module(here.parent, here.stem, ranks=2, timeout=120)
    assert out.returncode == 0 and out.stdout.count("compared") == 4, out.stderr


if __name__ == "__main__":
    work()
