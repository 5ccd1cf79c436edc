"""Products by the faster library: of anyone's linear layers and of ours, with PyTorch's values and gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mimir_fast.layers.borrowing import borrowed
from mimir_fast.layers.products import fast_products
from mimir_fast.models.classifier import ClassifierConfig, build_classifier
from mimir_fast.ops import _products


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


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Takes all but the smallest products, gain or not; how many it took, once the list is asked."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        pytest.skip("PyTorch without oneDNN")
    taken, product = [0], _products.product

    def counting(*args: Tensor | None) -> Tensor:
        taken[0] += 1
        return product(*args)

    monkeypatch.setattr(_products, "LARGE_PRODUCT", 2**16)
    monkeypatch.setattr(_products, "product", counting)
    monkeypatch.setattr(_products, "helps", lambda: True)
    return taken


def made(make: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return make().eval(), torch.rand(6, 3, 32, 32)


@pytest.mark.parametrize("make", [others, ours])
def test_values_and_gradients_are_pytorchs(make, library: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = made(make)
    with borrowed(model, "eval") as module:
        with monkeypatch.context() as patch:
            patch.setattr(_products, "helps", lambda: False)
            expected = answers(module, images)
        assert library[0] == 0
        with fast_products(module):
            found = answers(module, images)
        assert library[0] >= 4, "of both passes"
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()))
    # Whoever trains the weights gets their gradients.
    with fast_products(model):
        model(images).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.ndim == 2)


def test_training_gradients_of_our_layers_are_pytorchs(library: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = made(ours)

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(images).logsumexp(1).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    found = gradients()
    assert library[0] >= 3 * 4 * 12, "outputs, input gradients and weight gradients of twelve blocks"
    monkeypatch.setattr(_products, "helps", lambda: False)
    for name, expected in gradients().items():
        assert (found[name] - expected).norm() <= 1e-4 * expected.norm(), name


def test_operands_of_any_layout(library: list[int]) -> None:
    for x in (torch.randn(40, 70), torch.randn(70, 40).t(), torch.randn(40, 140)[:, ::2], torch.randn(41, 70)[1:]):
        for weight in (torch.randn(50, 70), torch.randn(70, 50).t(), torch.randn(100, 70)[::2]):
            assert _products.takes(x, weight)
            exact = x.double() @ weight.double().t()
            torch.testing.assert_close(_products.product(x, weight).double(), exact, rtol=0, atol=1e-4)


def test_what_looks_at_operations_or_differentiates_gets_pytorchs(library: list[int]) -> None:
    x, weight = torch.randn(64, 64), torch.randn(64, 64)
    assert _products.takes(x, weight) and not _products.takes(x[:4], weight)
    assert not _products.takes(x.double(), weight.double())
    assert not _products.takes(x, weight.clone().requires_grad_())
    with FlopCounterMode(display=False):
        assert not _products.takes(x, weight)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert not _products.takes(x, weight)
    finally:
        torch.set_float32_matmul_precision(before)
