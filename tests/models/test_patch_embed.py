"""The patch projection: its two ways are one, and what TF32 costs beside ε."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mimir_fast.layers.convolution import convolve
from mimir_fast.models.blocks import PatchEmbed

EPS = 8 / 255


def rounded(x: Tensor, bits: int) -> Tensor:
    """float32 rounded to so many significant bits, ties to even: 11 is TF32, 8 is bf16."""
    dropped = 24 - bits
    raw = x.contiguous().view(torch.int32)
    half = (1 << (dropped - 1)) - 1 + ((raw >> dropped) & 1)
    return ((raw + half) >> dropped << dropped).view(torch.float32)


def test_rounding_is_what_it_says() -> None:
    x = torch.randn(1000)
    assert torch.equal(rounded(x, 8), x.bfloat16().float())
    assert torch.equal(rounded(x, 11), x.half().float())  # normal numbers of half precision have 11 bits too


@pytest.mark.parametrize(("batch", "count", "patch_size", "channels"), [(2, 49, 16, 3), (1, 1, 2, 1), (3, 7, 4, 3)])
def test_the_convolution_is_the_product(batch: int, count: int, patch_size: int, channels: int) -> None:
    """Values and gradients; and nothing is copied: tokens come out as a product would leave them."""
    embed = PatchEmbed(channels, 24, patch_size)
    x = torch.rand(batch, count, patch_size**2 * channels, requires_grad=True)
    weight = embed.proj.weight.permute(0, 2, 3, 1).flatten(1)
    outputs = [product(x, weight, embed.proj.bias) for product in (F.linear, convolve)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-6)
    assert outputs[1].is_contiguous()
    seed = torch.randn_like(outputs[0])
    gradients = [torch.autograd.grad(y, (x, embed.proj.weight, embed.proj.bias), seed) for y in outputs]
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-5)


def test_tf32_is_small_beside_epsilon() -> None:
    """A token is off by 2⁻¹⁰·Σ|w| at most, a 32nd of what ε can do to it, and a perturbation by ε arrives.

    bf16 keeps neither bound: this test could fail.
    """
    torch.manual_seed(0)
    embed = PatchEmbed(3, 64, 16)
    weight, bias = embed.proj.weight.detach().permute(0, 2, 3, 1).flatten(1), embed.proj.bias
    x = torch.randint(0, 256, (4, 49, 768)) / 255
    attacked = (x + EPS * torch.randn_like(x).sign()).clamp(0, 1)

    def tokens(x: Tensor, bits: int) -> Tensor:
        return F.linear(rounded(x, bits).double(), rounded(weight, bits).double(), bias.double())

    exact = F.linear(x.double(), weight.double(), bias.double())
    bound = 2.0**-10 * weight.abs().sum(1)
    reach = EPS * weight.abs().sum(1)
    assert bool((bound < reach / 32).all())
    # The worst signs of all roundings: what the bound is made for.
    worst = [(F.linear((rounded(x, b) - x).abs(), weight.abs()) / weight.abs().sum(1)).max() for b in (11, 8)]
    assert worst[0] <= 2.0**-11 < worst[1]
    assert bool(((tokens(x, 11) - exact).abs() <= bound).all())
    moved = F.linear(attacked.double(), weight.double(), bias.double()) - exact
    assert (tokens(attacked, 11) - tokens(x, 11) - moved).norm() < 0.01 * moved.norm()
    assert (tokens(attacked, 8) - tokens(x, 8) - moved).norm() > 0.01 * moved.norm()


@pytest.mark.cuda
@pytest.mark.parametrize("tf32", [True, False])
def test_on_a_gpu_the_permission_decides(tf32: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the bound with TF32, and as exact as float32 without, as evaluations want it."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    embed = PatchEmbed(3, 768, 16).cuda()
    x = torch.rand(64, 49, 768, device="cuda")
    weight = embed.proj.weight.detach().permute(0, 2, 3, 1).flatten(1).double()
    exact = F.linear(x.double(), weight, embed.proj.bias.double())
    with torch.autocast("cuda", enabled=False):
        error = (embed(x).double() - exact).abs()
    limit = 2.0**-10 if tf32 else 2.0**-18
    assert bool((error <= limit * weight.abs().sum(1)).all())
