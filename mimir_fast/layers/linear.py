"""Linear layers together with the norm in front of them and the residual sum behind: the form in which they are fast.

On a CPU one op each, in bf16 under autocast where the CPU multiplies bf16, and in float32; elsewhere, and wherever a
module is more than its parameters (`inspection.py`), module after module. The only file that knows which kernels exist.
Shapes: x (…, K), outputs and residuals (…, N).
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimir_fast.layers import _bf16, _fp32, fused
from mimir_fast.layers.definitions import Kernels, MlpWeights, Norm
from mimir_fast.layers.inspection import fusible, is_plain, observed
from mimir_fast.layers.norms import CLEAN, LayerNorm, normalise
from mimir_fast.ops import _products

KERNELS = (cast(Kernels, _bf16), cast(Kernels, _fp32))


def kernels_for(x: Tensor, residual: Tensor | None, *parameters: Tensor | None) -> Kernels | None:
    """Those that compute with these tensors now, or None."""
    return None if observed() else next((k for k in KERNELS if k.takes(x, residual, *parameters)), None)


def linear(
    layer: nn.Module, x: Tensor, *, norm: nn.Module | None = None, domain: int = CLEAN, residual: Tensor | None = None
) -> Tensor:
    """[residual +] layer([norm](x)), (…, N)."""
    if is_plain(nn.Linear, layer):
        weight, bias = cast(nn.Linear, layer).weight, cast(nn.Linear, layer).bias
        return linear_by(weight, bias, x, norm=norm, domain=domain, residual=residual, layer=layer)
    y = layer(x if norm is None else normalise(norm, x, domain))
    return y if residual is None else residual + y


def linear_by(
    weight: Tensor, bias: Tensor | None, x: Tensor, *, norm: nn.Module | None = None, domain: int = CLEAN,
    residual: Tensor | None = None, layer: nn.Module | None = None,
) -> Tensor:  # fmt: skip
    """`linear` by a weight (N, K) and a bias (N,), which may be slices of a plain layer's.

    Args:
        layer: called where no fused path is taken, if the weights are the whole of it.
    """
    if norm is None or is_plain(LayerNorm, norm):
        in_front = None if norm is None else Norm(*cast(LayerNorm, norm).of(domain))
        kernels = kernels_for(x, residual, weight, bias, *(() if in_front is None else in_front[:2]))
        # Alone, PyTorch's float32 product is as good, if it comes from the faster library.
        accompanied = in_front is not None or residual is not None
        if kernels is not None and (kernels is not KERNELS[1] or accompanied or _products.helps()):
            return fused.linear(kernels, x, weight, bias, in_front, residual)
    if norm is not None:
        x = normalise(norm, x, domain)
    y = F.linear(x, weight, bias) if layer is None else layer(x)
    return y if residual is None else residual + y


@fusible
class Mlp(nn.Module):
    """Two linear layers with GELU between.

    Args:
        gelu: `erf` as it is defined, `tanh` its approximation, `quick` x·σ(1.702·x), which OpenAI's CLIP has.
    """

    def __init__(self, dim: int, hidden_dim: int, gelu: str = "erf") -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.gelu = gelu
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(…, K), same shape as x."""
        hidden = self.fc1(x)
        if self.gelu == "quick":
            return self.fc2(hidden * torch.sigmoid(1.702 * hidden))
        return self.fc2(F.gelu(hidden, approximate="tanh" if self.gelu == "tanh" else "none"))


def norm_mlp(norm: nn.Module, mlp: nn.Module, x: Tensor, domain: int = CLEAN, *, residual: bool) -> Tensor:
    """[x +] mlp(norm(x)), same shape as x."""
    if (weights := mlp_weights(mlp)) is not None and is_plain(LayerNorm, norm):
        in_front = Norm(*cast(LayerNorm, norm).of(domain))
        if (kernels := kernels_for(x, None, *weights, *in_front[:2])) is not None:
            return fused.mlp(kernels, x, in_front, weights, residual=residual)
    y = mlp(normalise(norm, x, domain))
    return x + y if residual else y


def mlp_weights(mlp: nn.Module) -> MlpWeights | None:
    """Those of a plain `Mlp` of plain layers with biases and the exact GELU; None for anything else."""
    if not is_plain(Mlp, mlp) or not is_plain(nn.Linear, mlp.fc1, mlp.fc2):  # type: ignore[arg-type]
        return None
    if mlp.gelu != "erf":
        return None
    fc1, fc2 = cast(Mlp, mlp).fc1, cast(Mlp, mlp).fc2
    return None if fc1.bias is None or fc2.bias is None else MlpWeights(fc1.weight, fc1.bias, fc2.weight, fc2.bias)
