"""Norm layers that can be kept twice, for clean and for adversarial data (AEMIM's adapters, arXiv 2407.11537).

Without adapters they are torch's, by name and by value. `add_adapter` makes a second copy of the parameters; its names
end in `_adversarial`; a forward pass says which domain its data are of. Domain 0 is clean, 1 adversarial.
"""

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimir_fast.layers.inspection import fusible

CLEAN, ADVERSARIAL = 0, 1
SUFFIX = "_adversarial"


def match_precision(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Cast weight and bias to float32 if x is float32: FSDP gathers them in bf16, the residual stream stays float32."""
    return (weight.float(), bias.float()) if x.dtype == torch.float32 else (weight, bias)


def normalise(norm: nn.Module, x: Tensor, domain: int = CLEAN) -> Tensor:
    """Call a norm for the data of a domain. On clean data it may be any module that takes x alone."""
    return norm(x) if domain == CLEAN else norm(x, domain)


@fusible
class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last dimension, eps 1e-6, with an adapter on demand."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__(dim, eps=eps)
        self.register_parameter("weight" + SUFFIX, None)
        self.register_parameter("bias" + SUFFIX, None)

    def add_adapter(self) -> None:
        """A second weight and bias, equal to the first ones."""
        self.weight_adversarial = nn.Parameter(self.weight.detach().clone())
        self.bias_adversarial = nn.Parameter(self.bias.detach().clone())

    def forward(self, x: Tensor, domain: int = CLEAN) -> Tensor:
        """Same shape as x (…, D)."""
        weight, bias, eps = self.of(domain)
        return F.layer_norm(x, self.normalized_shape, *match_precision(x, weight, bias), eps)

    def of(self, domain: int) -> tuple[Tensor, Tensor, float]:
        """Weight, bias and eps for the data of a domain."""
        if domain == CLEAN:
            return self.weight, self.bias, self.eps
        return self.weight_adversarial, self.bias_adversarial, self.eps


class NoNorm(nn.Identity):
    """Stands where a model has no norm."""

    def forward(self, x: Tensor, domain: int = CLEAN) -> Tensor:
        """x as it is, for data of any domain."""
        return x


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation of rows of channels, (…, D), with an adapter on demand.

    Rows are whatever tokens there are: of a masked image only the visible ones count (as in SparK, arXiv 2301.03580).
    """

    frozen = False

    def freeze(self) -> None:
        """Keep the running statistics and normalise by them from now on, in whatever mode the model is."""
        self.frozen = True
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """As every module, but a frozen one stays in eval mode."""
        return super().train(mode and not self.frozen)

    def add_adapter(self) -> None:
        """A second weight and bias, and running statistics of its own, equal to the first ones."""
        for name, parameter in list(self.named_parameters()):
            self.register_parameter(name + SUFFIX, nn.Parameter(parameter.detach().clone()))
        for name, buffer in list(self.named_buffers()):
            self.register_buffer(name + SUFFIX, buffer.clone())

    def forward(self, x: Tensor, domain: int = CLEAN) -> Tensor:
        """Same shape as x (…, D)."""
        suffix = "" if domain == CLEAN else SUFFIX
        weight, bias, mean, var, count = (
            getattr(self, name + suffix)
            for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        )
        weight, bias = match_precision(mean, weight, bias)
        if self.training and not self.track_running_stats:
            mean = var = None  # an attack borrows the layer: batch statistics, and none remembered
        elif self.training and _recomputing():
            mean, var = mean.clone(), var.clone()  # as many tensors as before are kept, which checkpointing checks
        elif self.training:
            count += 1
        rows = x.reshape(-1, x.shape[-1])
        return F.batch_norm(rows, mean, var, weight, bias, self.training, self.momentum or 0.0, self.eps).view_as(x)


def _recomputing() -> bool:
    """Inside a backward pass, where activation checkpointing computes a batch again that was counted before.

    torch.compile, which recomputes by itself, sees each layer once.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def add_adapters(module: nn.Module) -> None:
    """Every normalisation layer inside gets its second set of parameters."""
    for layer in module.modules():
        if isinstance(layer, (LayerNorm, BatchNorm)):
            layer.add_adapter()


def is_adapter(name: str) -> bool:
    """True for the name of a tensor that serves adversarial data only."""
    return name.endswith(SUFFIX)
