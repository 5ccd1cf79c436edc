"""Products by the faster library: of anyone's linear layers and of ours, with PyTorch's values and gradients."""

import pytest
import torch
from torch import Tensor, nn

from mimir_fast.layers import products
from mimir_fast.layers.borrowing import borrowed
from mimir_fast.models.classifier import ClassifierConfig, build_classifier


def others() -> nn.Module:
    """Nobody's own layers, some with too few numbers to gain; attention multiplies by a weight that is no layer's."""

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.attention = nn.Linear(48, 256), nn.MultiheadAttention(256, 4, batch_first=True)
            self.head = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 7, bias=False))

        def forward(self, images: Tensor) -> Tensor:
            x = self.embed(nn.functional.unfold(images, 4, stride=4).transpose(1, 2))
            return self.head(x + self.attention(x, x, x)[0]).mean(1)

    return Attending()


def ours() -> nn.Module:
    return build_classifier(ClassifierConfig(encoder="tiny", patch_size=4, drop_path=0.0, head_std=0.1), 32, 7)


def answers(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    x = images.clone().requires_grad_()
    logits = model(x)
    return logits.detach(), torch.autograd.grad(logits.logsumexp(1).sum(), x)[0]


@pytest.mark.parametrize("make", [others, ours])
def test_values_and_gradients_are_pytorchs(make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the library can be called at all; whether it gains is a matter of the processor."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        pytest.skip("PyTorch without oneDNN")
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model, images = make().eval(), torch.rand(6, 3, 32, 32)
    monkeypatch.setattr(products, "helps", lambda: True)
    monkeypatch.setattr(products, "LARGE_PRODUCT", 2**16)
    taken, product = [0], products.product

    def counting(*args: Tensor | None) -> Tensor:
        taken[0] += 1
        return product(*args)

    monkeypatch.setattr(products, "product", counting)
    with borrowed(model, "eval") as module:
        expected = answers(module, images)
        assert taken[0] == 0 and not products.active()
        with products.fast_products(module):
            found = answers(module, images)
        assert taken[0] >= 4, "of both passes"
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()))
    assert not products.active()
    # Whoever trains the weights gets their gradients.
    with products.fast_products(model):
        model(images).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.ndim == 2)
