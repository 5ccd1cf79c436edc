"""Processes and how the model is spread over them: one process, DDP, or FSDP2.

The model knows nothing of this; `parallelize` applies it in a fixed order (compile, then shard or wrap), and methods
see either the wrapped model or, through `attacks.no_trace.borrowed`, the bare one.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Strategy = Literal["auto", "single", "ddp", "fsdp"]


@dataclass(frozen=True)
class World:
    """This process among all of them."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes logs and pictures."""
        return self.rank == 0


def start_world(device: str = "auto") -> World:
    """Join the processes torchrun started (gloo for CPU tensors, NCCL for CUDA), or be alone.

    Raises:
        ValueError: a CUDA device is asked for and there is none.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}, but torch sees no CUDA GPU here: use --device cpu (or leave it at auto)")
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device.split(":")[0]
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if kind == "cuda":
        local = torch.device(device if ":" in device else f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
        torch.cuda.set_device(local)
    else:
        local = torch.device(kind)
    if size > 1 and not dist.is_initialized():
        # CPU tensors go through gloo also on GPU machines: agreeing on a signal must not wait for the GPU.
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    return World(rank, size, local)


def stop_world() -> None:
    """Leave the process group, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def agree(flag: bool) -> bool:
    """True on every rank when it is True on any."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return flag
    votes = torch.tensor([int(flag)])
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return bool(votes.item())


def mean_over_ranks(values: Tensor) -> Tensor:
    """Elementwise mean of a tensor over all ranks."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def parallelize(model: nn.Module, strategy: Strategy, world: World, *, bf16: bool, compile_blocks: bool) -> nn.Module:
    """The model as the loop calls it. Blocks are compiled, then sharded or the whole is wrapped.

    Raises:
        ValueError: a strategy that needs several processes, started with one.
    """
    layers: list[nn.Module] = model.layers()  # type: ignore[operator]
    if compile_blocks:
        for layer in layers:
            layer.compile()
    if strategy == "auto":
        strategy = "ddp" if world.size > 1 else "single"
    if strategy == "single":
        if world.size > 1:
            raise ValueError(f"--strategy single with {world.size} processes: use ddp or fsdp, or start one process")
        return model
    if not dist.is_initialized():
        raise ValueError(
            f"--strategy {strategy} needs several processes: torchrun --nproc_per_node 2 -m mimir_fast.pretrain … "
            "(or --strategy single)"
        )
    if strategy == "ddp":
        ids = [world.device.index] if world.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True)
    return _shard(model, layers, world, bf16)


def _shard(model: nn.Module, layers: list[nn.Module], world: World, bf16: bool) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    # Blocks travel in bf16; the root (patch embedding, norms, head) stays in fp32, see Encoder.embed.
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy if bf16 else MixedPrecisionPolicy())
    fully_shard(model, mesh=mesh)
    return model


@contextmanager
def gradient_sync(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Reduce gradients over ranks in this backward pass, or only accumulate them."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
        yield
    elif isinstance(model, DistributedDataParallel) and not enabled:
        with model.no_sync():
            yield
    else:
        yield
