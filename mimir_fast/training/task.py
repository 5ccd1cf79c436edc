"""What the loop needs to know of the thing it trains."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from torch import nn

from mimir_fast.data.batch import Batch
from mimir_fast.methods.registry import Pass
from mimir_fast.models.load_report import LoadReport


class Task(Protocol):
    """Pre-training and fine-tuning are two of these.

    Attributes:
        kind: `pretrain` or `finetune`, written into checkpoints.
        model: the bare module.
        method: what makes the loss of a batch.
        architecture: what is needed to build the model again, as plain JSON values.
        curves: the scalars worth drawing when the run is over.
        init_report: what became of the weights it started from, None without such.
        replays: steps in turn that are made with the same batches; a run stops and saves between such rows of steps.
    """

    kind: str
    model: nn.Module
    method: Any
    architecture: dict[str, Any]
    curves: tuple[str, ...]
    init_report: LoadReport | None
    replays: int

    def passes(self, model: nn.Module, batches: Sequence[Batch], *, seed: int, step: int) -> list[Pass]:
        """The training passes of a step, one for each micro-batch; `model` may be wrapped for data parallelism."""
        ...

    def pictures(self, model: nn.Module, batch: Batch, *, seed: int, step: int) -> dict[str, np.ndarray]:
        """uint8 (H, W, 3) pictures by name. Called on every rank, because a sharded model needs all of them."""
        ...

    def evaluate(self, model: nn.Module, *, step: int) -> dict[str, float]:
        """Numbers at the end of an epoch; `score`, when there, decides which checkpoint is the best."""
        ...

    def alarm(self) -> str | None:
        """A warning after an evaluation that showed something is going wrong, or None."""
        ...

    def describe(self, num_samples: int) -> str:
        """What is trained on what, for the head of the output."""
        ...
