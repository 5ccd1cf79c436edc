"""A step's own products: the list is the model's, and their rate is measured as often as a step runs them."""

from collections import Counter

import pytest
import torch

from benchmarks import products
from benchmarks.products import Products, forward_shapes, product_seconds
from benchmarks.training import build_model, masked_flops, some_view
from mimir_fast.models.masked_model import ModelConfig

CPU = torch.device("cpu")
TIMES = {1: ((1.0, 2.0, 3.0), 0.0), 2: ((10.0, 20.0, 30.0), 0.25)}


def test_products_are_those_of_the_model() -> None:
    model = build_model(ModelConfig(encoder="tiny"), 224, CPU).double()
    found = forward_shapes(lambda: model(some_view(model)), batch=8)
    encoder, decoder, wanted = 8 * 50, 8 * 197, 8 * 147
    assert found[8 * 49, 768, 192] == found[encoder, 192, 128] == found[wanted, 128, 768] == 1
    assert found[encoder, 192, 576] == found[encoder, 192, 768] == found[encoder, 768, 192] == 12
    # Of the two blocks of the decoder the last computes the masked tokens only.
    assert found[decoder, 128, 512] == found[wanted, 128, 512] == 1
    # Attention is the rest of the count.
    flops = sum(2 * m * k * n * count for (m, k, n), count in found.items())
    assert 0.9 * 8 * masked_flops("tiny", "light", 224, 16) < flops < 8 * masked_flops("tiny", "light", 224, 16)


def test_rate_weighs_each_product_by_its_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "product_seconds", lambda m, *_: TIMES[m])
    step = Products(Counter({(1, 5, 1): 1, (2, 5, 1): 4}), (2, 2, 1))
    flops, seconds = 5 * 10 + 4 * 5 * 20, (2 * 1 + 2 * 2 + 3) + 4 * (2 * 10 + 2 * 20 + 30)
    rate, disturbed = step.tflops("fp32", CPU)
    assert rate == pytest.approx(flops / seconds / 1e12) and disturbed == 0.25


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_seconds_are_of_three_products_and_measured_once(precision: str) -> None:
    found = product_seconds(8, 4, 16, precision, CPU)
    assert len(found[0]) == 3 and all(0 < s < 1 for s in found[0]) and found[1] == 0.0
    assert product_seconds(8, 4, 16, precision, CPU) is found
