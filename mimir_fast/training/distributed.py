"""How the model is spread over the processes: one of them, DDP, or FSDP2.

The model knows nothing of this; `parallelize` applies it in a fixed order (recompute, compile, then shard or wrap), and
methods see either the wrapped model or, through `layers.borrowing.borrowed`, the bare one.
"""

from functools import partial
from inspect import signature
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from mimir_fast.training.compile import compile_modules
from mimir_fast.world import World, start_world, stop_world

__all__ = ["Strategy", "World", "parallelize", "start_world", "stop_world"]

Strategy = Literal["auto", "single", "ddp", "fsdp"]

# Running statistics are averaged once a step (statistics.py), other buffers are functions of the configuration: nothing
# to send. The option's name changed after torch 2.11.
_NAMES = signature(DistributedDataParallel.__init__).parameters
_KEEP_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _NAMES else "broadcast_buffers": False
}


def parallelize(
    model: nn.Module, strategy: Strategy, world: World, *, bf16: bool, compiled: bool,
    checkpoint_activations: bool = False, shard_ranks: int | None = None,
) -> nn.Module:  # fmt: skip
    """The model as the loop calls it. Blocks are made to recompute, it is compiled, then sharded or wrapped.

    Raises:
        ValueError: a strategy that needs several processes, started with one; or shards that do not fit them.
    """
    layers: list[nn.Module] = model.layers()  # type: ignore[operator]
    if checkpoint_activations:
        for layer in layers:
            # The layer's own forward, so that names in checkpoints stay. Its randomness is a function of the step.
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    if strategy == "auto":
        strategy = "ddp" if world.size > 1 else "single"
    if compiled:
        compile_modules([model] if strategy == "single" else layers)
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
        return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True, **_KEEP_BUFFERS)
    return _shard(model, layers, world, bf16, shard_ranks)


def _shard(model: nn.Module, layers: list[nn.Module], world: World, bf16: bool, shard_ranks: int | None) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    kind = world.device.type
    if shard_ranks is None or shard_ranks == world.size:
        mesh = init_device_mesh(kind, (world.size,))
    elif world.size % shard_ranks:
        fits = ", ".join(str(n) for n in range(1, world.size + 1) if world.size % n == 0)
        raise ValueError(f"--shard_ranks {shard_ranks} does not divide {world.size} ranks; these do: {fits}")
    else:  # parameters are sharded within rows of the mesh and the same in each row
        mesh = init_device_mesh(kind, (world.size // shard_ranks, shard_ranks), mesh_dim_names=("replicate", "shard"))
    # Blocks travel in bf16; the root (patch embedding, norms, head) stays in fp32, see Encoder.embed. What goes into a
    # block stays as it is: the encoder's residual stream is fp32, as it is under autocast in one process.
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy if bf16 else MixedPrecisionPolicy())
    fully_shard(model, mesh=mesh)
    return model
