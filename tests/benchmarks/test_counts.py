"""What a step asks of a GPU, counted from shapes: the rules on steps small enough to count by hand, and the page."""

import json

import pytest
import torch

from benchmarks import counts, operators
from benchmarks.predictions import FILE
from benchmarks.training import masked_flops

WRITTEN = json.loads(FILE.read_text())["step_counts"]


def test_operators_of_a_product_and_a_sum():
    """(8, 4) bf16 by (4, 16), plus one, squared, summed: the product, then one kernel."""
    x, w = torch.ones(8, 4, device=operators.META), torch.ones(4, 16, device=operators.META)
    with operators.Recorder() as recorder:
        (torch.mm(x, w).add(1) ** 2).t().mean()
    assert [call.name for call in recorder.calls] == ["mm", "add", "pow", "mean"]
    product, result = 4 * (8 * 4 + 4 * 16 + 8 * 16), 4 * 8 * 16
    eager = operators.total(recorder.calls)
    assert (eager.launches, eager.flops) == (4, 2 * 8 * 4 * 16)
    assert eager.bytes == product + 2 * result + 2 * result + result + 4
    fused = operators.total(recorder.fused())
    assert (fused.launches, fused.bytes) == (2, product + result + 4)
    assert counts.once_read(recorder.fused()) == 2 * result


def test_a_product_lies_between():
    """x + 1 and (x + 1) + (x + 1) w are not one kernel: the second waits for the product of the first."""
    x, w = torch.ones(8, 8, device=operators.META), torch.ones(8, 8, device=operators.META)
    with operators.Recorder() as recorder:
        shifted = x + 1
        shifted + shifted @ w
    assert [call.name for call in recorder.fused()] == ["add", "mm", "add"]


def test_products_in_bf16_and_weights_cast_once():
    weight = torch.ones(4, 4, device=operators.META, requires_grad=True)
    x = torch.ones(2, 4, device=operators.META)

    def loss():
        y = torch.nn.functional.linear(torch.nn.functional.linear(x, weight), weight)
        assert y.dtype == torch.bfloat16
        return y.float().sum()

    names = [call.name for call in operators.record(loss).calls]
    assert names[:4] == ["_to_copy", "_to_copy", "mm", "mm"]  # of x and of the weight


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "MIMIR ViT-S/16" else [pytest.mark.slow]) for n in WRITTEN]
)
def test_what_is_written_is_what_is_counted(name):
    """A change of these numbers is to be understood, then written: `python -m benchmarks.counts --write`."""
    found = counts.count(name)
    assert found == WRITTEN[name]
    assert found["uploads"] == 0
    if name == "MIMIR ViT-S/16":  # a fifth for each pass; attention's backward pass computes the scores again
        assert found["eager"]["TFLOP"] == pytest.approx(
            5 * counts.BATCH * masked_flops("small", "light", 224, 16) / 1e12, rel=0.05
        )


def test_the_page_has_the_tables():
    page = counts.PAGE.read_text()
    assert page.partition(counts.BEGIN)[2].partition(counts.END)[0].strip() == counts.tables(WRITTEN)
