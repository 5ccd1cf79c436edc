"""Norms whose parameters travel in bf16, as FSDP's shards do, beside inputs in float32 and in bf16."""

import pytest
import torch

from mimir_fast.layers.norms import BatchNorm, LayerNorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [LayerNorm, BatchNorm])
def test_parameters_in_bf16_keep_the_dtype_of_the_stream(kind: type, dtype: torch.dtype) -> None:
    """The values are those of the rounded parameters; statistics stay in float32."""
    exact, sharded = kind(24), kind(24)
    with torch.no_grad():
        for norm in (exact, sharded):
            norm.weight.copy_(torch.linspace(0.5, 2, 24).bfloat16())
            norm.bias.copy_(torch.linspace(-1, 1, 24).bfloat16())
    sharded.weight.data, sharded.bias.data = sharded.weight.data.bfloat16(), sharded.bias.data.bfloat16()
    x = torch.randn(4, 9, 24).to(dtype)
    wanted, found = exact(x), sharded(x)
    assert found.dtype == dtype
    torch.testing.assert_close(
        found, wanted, rtol=0.02 if dtype == torch.bfloat16 else 0, atol=0.02 * (dtype != torch.float32)
    )
    found.float().square().sum().backward()
    assert sharded.weight.grad.dtype == torch.bfloat16
    if kind is BatchNorm:
        assert sharded.running_mean.dtype == torch.float32 and torch.equal(sharded.running_mean, exact.running_mean)
