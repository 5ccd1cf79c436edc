"""Mask, noise and attack of a step as a CUDA graph, recorded once and replayed (`attack.cuda_graph`)."""

from collections.abc import Callable

import torch
from torch import Tensor

from mimir_fast.attacks.replay import Replay
from mimir_fast.data.batch import Batch
from mimir_fast.methods.masks import Mask
from mimir_fast.methods.step import MaskedStep


class RecordedInputs:
    """Fills mask, visible and whole into a step, from one recording for each model, seed, shape and precision.

    Args:
        prepare: fills them in, without reading a number on the host.
    """

    def __init__(self, prepare: Callable[[MaskedStep], None]) -> None:
        self._prepare = prepare
        self.replays: dict[object, Replay] = {}

    def __call__(self, step: MaskedStep) -> None:
        """Raises ValueError for a model of FSDP2."""
        from torch.distributed.fsdp import FSDPModule

        model, seed, images, samples = step.model, step.seed, step.batch.images, step.batch.samples
        if isinstance(model, FSDPModule):
            raise ValueError(
                "attack.cuda_graph reads weights where they lay when it was recorded, but FSDP gathers them anew in "
                "each step: use --strategy ddp, or leave it out"
            )

        def prepare(images: Tensor, samples: Tensor, number: Tensor) -> tuple[Tensor, ...]:
            own = MaskedStep(model, Batch(images, samples, samples, samples), seed, number)
            self._prepare(own)
            return *own.mask, own.visible, *(() if own.whole is None else (own.whole,))

        assert isinstance(step.number, int)
        inputs = images, samples, torch.full((), step.number, dtype=torch.int64, device=images.device)
        autocast = torch.is_autocast_enabled(images.device.type)
        key = id(model), seed, model.training, images.shape, images.dtype, autocast
        if key not in self.replays:
            self.replays[key] = Replay(prepare, inputs)
        keep, masked, step.visible, *whole = self.replays[key](*inputs)
        step.mask, step.whole = Mask(keep, masked), whole[0] if whole else None
