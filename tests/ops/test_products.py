"""Products by the faster library: values and gradients are those of PyTorch, and it is left where it does not fit."""

from pathlib import Path

import pytest
import torch
from commands import run_code
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mimir_fast import _native
from mimir_fast.models.classifier import ClassifierConfig, build_classifier
from mimir_fast.ops import _products


def ours() -> nn.Module:
    return build_classifier(ClassifierConfig(encoder="tiny", patch_size=4, drop_path=0.0, head_std=0.1), 32, 7)


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


@pytest.mark.skipif(not _native.has("fp32_gelu"), reason="our layers are PyTorch's without the C++ ops")
@pytest.mark.parametrize("frozen", [False, True])
def test_our_layers_have_pytorchs_values_and_gradients(
    frozen: bool, library: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = ours(), torch.rand(6, 3, 32, 32)
    model.requires_grad_(not frozen)

    def found() -> dict[str, Tensor]:
        model.zero_grad()
        x = images.clone().requires_grad_()
        logits = model(x)
        logits.logsumexp(1).sum().backward()
        kept = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {"logits": logits.detach(), "images": x.grad} | kept

    ours_found = found()
    wanted = (2 if frozen else 3) * (1 + 4 * 12)
    assert library[0] >= wanted, "outputs and gradients of the patch embedding and twelve blocks"
    monkeypatch.setattr(_products, "helps", lambda: False)
    expected = found()
    assert set(ours_found) == set(expected) and (frozen or len(expected) > 100)
    for name, tensor in expected.items():
        assert (ours_found[name] - tensor).norm() <= 1e-4 * tensor.norm(), name


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
    with torch.backends.mkldnn.flags(enabled=False):
        assert not _products.takes(x, weight)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert not _products.takes(x, weight)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("setting", ["cuda.matmul", "mkldnn.matmul", "mkldnn"])
def test_the_newer_settings_of_precision_are_read(library: list[int], setting: str, tmp_path: Path) -> None:
    """In a process of its own: PyTorch refuses to mix these settings with the older one for good."""
    lines = f"""
import torch
from mimir_fast import hsic
from mimir_fast.ops import _products
_products.helps = lambda: True
torch.backends.{setting}.fp32_precision = {"tf32" if "cuda" in setting else "bf16"!r}
x, y = torch.randn(256, 784), torch.randn(256, 64)
print(float(hsic(x, y)) > 0, _products.takes(x, x))
"""
    done = run_code(tmp_path, lines)
    assert done.stdout.split() == ["True", str("cuda" in setting)], done.stderr[-800:]
