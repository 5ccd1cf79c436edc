"""Two gloo processes with 8 samples each against one process with 16: same value, same gradients."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mimir_fast.ops.global_batch import gather_batch
from mimir_fast.ops.hsic import hsic

RANKS, LOCAL = 2, 8


def data() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.rand(RANKS * LOCAL, 3, 4, 4, generator=g)
    return x, x.flatten(1)[:, :20] + 0.1 * torch.rand(RANKS * LOCAL, 20, generator=g)


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 12))


def run_rank(rank: int, directory: str, job: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{directory}/store", RANKS), rank=rank, world_size=RANKS)
    try:
        torch.save(JOBS[job](rank), f"{directory}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def run_ranks(job: str, directory: Path) -> list[dict[str, torch.Tensor]]:
    mp.start_processes(run_rank, args=(str(directory), job), nprocs=RANKS, start_method="fork")
    return [torch.load(directory / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def gathered_under_ddp(rank: int) -> dict[str, torch.Tensor]:
    x, z = (t[rank * LOCAL : (rank + 1) * LOCAL] for t in data())
    model = DistributedDataParallel(encoder())
    loss = hsic(gather_batch(x), gather_batch(model(z)), sigma_y=0.5)
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.module.named_parameters()}}


JOBS = {"gathered_under_ddp": gathered_under_ddp}


def test_gather_under_ddp_equals_one_process(tmp_path: Path) -> None:
    x, z = data()
    model = encoder()
    loss = hsic(x, model(z), sigma_y=0.5)
    loss.backward()
    for result in run_ranks("gathered_under_ddp", tmp_path):
        torch.testing.assert_close(result["loss"], loss.detach(), rtol=1e-6, atol=0)
        for name, p in model.named_parameters():
            torch.testing.assert_close(result[name], p.grad, rtol=1e-4, atol=1e-8)


def test_alone_returns_its_input() -> None:
    x = torch.rand(3, 2)
    assert gather_batch(x) is x


@pytest.mark.parametrize("shape", [(5, 3), (1, 2, 2)], ids=str)
def test_alone_keeps_the_gradient(shape: tuple[int, ...]) -> None:
    x = torch.rand(shape, requires_grad=True)
    (grad,) = torch.autograd.grad(gather_batch(x).square().sum(), x)
    torch.testing.assert_close(grad, 2 * x.detach())
