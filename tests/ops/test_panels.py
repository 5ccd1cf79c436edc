"""Samples are centred a panel of features at a time: the numbers are those of one panel, the memory is not."""

import pytest
import torch

from mimir_fast.ops.dependence import bandwidth, pair_tiles
from mimir_fast.ops.dependence.bandwidth import Centered
from mimir_fast.ops.dependence.rbf import rbf_minus_one
from mimir_fast.ops.hsic import hsic, hsic_reference


def samples(n: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(n, 200)
    y = torch.tanh(x[:, :70] * 2 - 1) + 0.1 * torch.randn(n, 70)
    return x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_()


@pytest.fixture(params=[1, 3000])
def panel_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """So few that 200 features are four panels of 64, or two of which one is cut."""
    monkeypatch.setattr(bandwidth, "PANEL_BYTES", request.param)
    return int(request.param)


@pytest.mark.parametrize("rule", ["reference", "median"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "streamed"])
def test_value_and_gradients_are_those_of_the_definition(panel_bytes, monkeypatch, rule, dtype, kept):
    monkeypatch.setattr(pair_tiles, "KEPT_ROWS", {"cpu": 2048 if kept else 0, "cuda": 0})
    monkeypatch.setattr(pair_tiles, "lower_tiles", small_tiles)
    x, y = samples(37, dtype)
    exact = [t.detach().double().requires_grad_() for t in (x, y)]
    value, definition = hsic(x, y, bandwidth=rule), hsic_reference(*exact, bandwidth=rule)
    torch.testing.assert_close(value.double(), definition, rtol=1e-4, atol=0)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4  # gradients are rounded to the dtype of the input
    for ours, theirs in zip(torch.autograd.grad(value, (x, y)), torch.autograd.grad(definition, exact), strict=True):
        assert (ours.double() - theirs).norm() < tolerance * theirs.norm()


def small_tiles(n, device):
    for i in range(0, n, 16):
        for j in (i, *range(0, i, 16)):
            yield slice(i, min(i + 16, n)), slice(j, min(j + 16, n))


def test_kernel_matrix_and_its_gradient(panel_bytes):
    x, _ = samples(21, torch.float32)
    weights, gamma = torch.randn(21, 21), torch.tensor(0.01, dtype=torch.float64)
    exact = x.detach().double().requires_grad_()
    definition = torch.expm1(-gamma * torch.cdist(exact, exact, compute_mode="donot_use_mm_for_euclid_dist").square())
    torch.testing.assert_close(rbf_minus_one(x, gamma).double(), definition, rtol=1e-4, atol=1e-6)
    (ours,) = torch.autograd.grad((rbf_minus_one(x, gamma) * weights).sum(), x)
    pairs = (exact[:, None] - exact[None]).square().sum(dim=2)
    (theirs,) = torch.autograd.grad((torch.expm1(-gamma * pairs) * weights).sum(), exact)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-5)


def test_panels_cover_the_features_once_and_fit(monkeypatch):
    for limit, x in ((4096, torch.rand(5, 333)), (1, torch.rand(5, 333)), (2**20, torch.rand(5, 333).half())):
        monkeypatch.setattr(bandwidth, "PANEL_BYTES", limit)
        centered = Centered(x, torch.float32)
        panels = list(centered.panels())
        assert [i for panel in panels for i in range(panel.start, panel.stop)] == list(range(333))
        assert all((p.stop - p.start) * 5 * 4 <= max(limit, 64 * 5 * 4) for p in panels)
        joined = torch.cat([centered.part(slice(0, 5), panel) for panel in panels], dim=1)
        torch.testing.assert_close(joined, x.float() - x.float().mean(dim=0), rtol=0, atol=1e-6)
