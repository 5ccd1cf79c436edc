"""Linear layers together with the norm in front of them and the residual sum behind: the form in which they are fast.

On a CPU one op each: under bf16 autocast where there are matrix units (ops/bf16_layers.py), and in float32
(ops/fp32_layers.py); elsewhere layer after layer.
Shapes: x (…, K), outputs and residuals (…, N).
"""

from torch import Tensor, nn

from mimir_fast.models.norms import CLEAN, LayerNorm
from mimir_fast.ops import bf16_layers, fp32_layers
from mimir_fast.ops.layer_definitions import Norm


def project(
    layer: nn.Linear, x: Tensor, *, norm: LayerNorm | None = None, domain: int = CLEAN, residual: Tensor | None = None
) -> Tensor:
    """[residual +] layer([norm](x)), (…, N)."""
    return project_by(layer.weight, layer.bias, x, norm=norm, domain=domain, residual=residual)


def project_by(
    weight: Tensor, bias: Tensor | None, x: Tensor, *, norm: LayerNorm | None = None, domain: int = CLEAN,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`project` by a weight (N, K) and a bias (N,), which may be slices of a layer's."""
    wanted = None if norm is None else Norm(*norm.of(domain))
    parameters = () if wanted is None else wanted[:2]
    if bf16_layers.takes(x, weight, bias, *parameters):
        return bf16_layers.linear(x, weight, bias, wanted, residual)
    if (norm is not None or residual is not None) and fp32_layers.takes(x, weight, bias, residual, *parameters):
        return fp32_layers.linear(x, weight, bias, wanted, residual)
    y = nn.functional.linear(x if norm is None else norm(x, domain), weight, bias)
    return y if residual is None else residual + y


class Mlp(nn.Module):
    """Two linear layers with GELU between."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))

    def after(self, norm: LayerNorm, x: Tensor, domain: int = CLEAN, *, residual: bool = False) -> Tensor:
        """[x +] mlp(norm(x))."""
        weights = (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        wanted = Norm(*norm.of(domain))
        for ops in (bf16_layers, fp32_layers):
            if ops.takes(x, *weights, *wanted[:2]):
                return ops.mlp(x, wanted, *weights, residual=residual)
        y = self(norm(x, domain))
        return x + y if residual else y
