"""From the public functions through registration and dispatch into the Triton kernels: the way a GPU takes.

Without a GPU the kernels are interpreted, and dispatch is told that the CPU has Triton and no C++.
"""

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import mimir_fast
from mimir_fast.ops import linf_step, noisy_patches

pytest.importorskip("triton")

Call = Callable[[dict[str, Tensor]], Tensor]


def operands(device: torch.device) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    given = {
        "x": normal(20, 33) + 3,
        "z": normal(20, 12),
        "images": torch.rand(2, 3, 8, 8, generator=rng),
        "prediction": normal(2, 5, 12),
        "tokens": normal(2, 16, 8),
        "visible": normal(2, 5, 8),
        "mask_token": normal(8),
        "positions": normal(16, 8),
        "ids": torch.rand(2, 16, generator=rng).argsort(1)[:, :5].contiguous(),
        "samples": torch.tensor([7, 2**33]),
    }
    return {name: t.to(device) for name, t in given.items()}


CALLS: dict[str, Call] = {
    "hsic": lambda t: mimir_fast.hsic(t["x"], t["z"], sigma=1.0),
    "nhsic": lambda t: mimir_fast.nhsic(t["x"], t["z"], sigma=1.0, eps=1e-2),
    "renyi_mi": lambda t: mimir_fast.renyi_mi(t["x"], t["z"]),
    "gather_patches": lambda t: mimir_fast.gather_patches(t["tokens"], t["ids"]),
    "scatter_patches": lambda t: mimir_fast.scatter_patches(t["visible"], t["ids"], t["mask_token"], t["positions"]),
    "patchify_gather": lambda t: mimir_fast.patchify_gather(t["images"], t["ids"], 2),
    "masked_targets": lambda t: mimir_fast.masked_targets(t["images"], t["ids"], 2),
    "masked_loss": lambda t: mimir_fast.masked_loss(t["prediction"], t["images"].detach(), t["ids"], 2),
    "noisy_patches": lambda t: noisy_patches.noisy_patches(
        t["images"].detach(), t["ids"], 2, t["samples"], seed=3, step=1, eps=0.1
    )[1],
    "linf_step": lambda t: mimir_fast.linf_step(t["images"], t["images"] - 0.5, t["images"], alpha=0.1, eps=0.05),
    "random_start_linf": lambda t: mimir_fast.random_start_linf(t["images"], t["samples"], seed=3, step=1, eps=0.1),
    "random_masks": lambda t: mimir_fast.random_masks(t["samples"], 16, 5, seed=3, step=1)[0].double(),
}


def value_and_gradients(call: Call, given: dict[str, Tensor]) -> list[Tensor]:
    leaves = {name: t.clone().requires_grad_() if t.is_floating_point() else t for name, t in given.items()}
    value = call(leaves)
    if not value.requires_grad:
        return [value]
    wanted = [t for t in leaves.values() if t.requires_grad]
    grads = torch.autograd.grad(value.sin().sum(), wanted, allow_unused=True)
    return [value.detach(), *[g for g in grads if g is not None]]


def by_triton(monkeypatch: pytest.MonkeyPatch, triton_device: torch.device) -> list[object]:
    """Ops run Triton's kernels from now on; the questions who runs them are collected."""
    asked: list[object] = []

    def runs_triton(*given: Tensor, any_dtype: bool = False) -> bool:
        asked.append(given)
        return any_dtype or all(t.dtype != torch.float64 for t in given)

    if triton_device.type == "cpu":
        for path, module in list(sys.modules.items()):
            if path.startswith("mimir_fast.ops.") and hasattr(module, "runs_triton"):
                monkeypatch.setattr(module, "runs_triton", runs_triton)
        monkeypatch.setattr(linf_step, "runs_native", lambda *_: False)
    return asked


@pytest.mark.parametrize("name", CALLS)
def test_kernels_behind_the_public_function(name, triton_device, monkeypatch):
    expected = value_and_gradients(CALLS[name], operands(torch.device("cpu")))
    asked = by_triton(monkeypatch, triton_device)
    actual = value_and_gradients(CALLS[name], operands(triton_device))
    assert asked or triton_device.type == "cuda"
    for ours, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), wanted, rtol=2e-4, atol=2e-5)


STRANGE = (torch.nan, torch.inf, 1e30)


@pytest.mark.parametrize("name", [name for name in CALLS if name not in ("hsic", "nhsic", "renyi_mi")])
def test_strange_numbers_arrive_as_by_the_definition(name, triton_device, monkeypatch):
    """A NaN, an Inf and a number whose square overflows: each in a row of its own."""
    given = operands(torch.device("cpu"))
    for t in given.values():
        if t.is_floating_point():
            t.flatten()[: 3 * 7 : 7] = torch.tensor(STRANGE)[: len(t.flatten()[: 3 * 7 : 7])]
    expected = value_and_gradients(CALLS[name], given)
    asked = by_triton(monkeypatch, triton_device)
    actual = value_and_gradients(CALLS[name], {key: t.to(triton_device) for key, t in given.items()})
    assert asked or triton_device.type == "cuda"
    for ours, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), wanted, rtol=2e-4, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("value", STRANGE)
@pytest.mark.parametrize("name", ["hsic", "nhsic", "renyi_mi"])
def test_strange_samples_are_seen(name, value, triton_device, monkeypatch):
    given = operands(triton_device)
    given["x"][3, 5] = value
    by_triton(monkeypatch, triton_device)
    if triton_device.type == "cuda":
        assert CALLS[name](given).isnan()
    monkeypatch.setenv("MIMIR_FAST_DEBUG", "1")
    with pytest.raises(ValueError, match="must be finite"):
        CALLS[name](given)


@pytest.mark.parametrize("name", ["hsic", "nhsic", "renyi_mi"])
def test_a_kernel_that_does_not_fit_leaves_the_work_to_pytorch(name, triton_device, monkeypatch):
    from triton.runtime.errors import OutOfResources

    from mimir_kernels import laplacian, pair_sums, rbf

    def too_large(*_: object, **__: object) -> Tensor:
        raise OutOfResources(245_808, 232_448, "shared memory")

    expected = value_and_gradients(CALLS[name], operands(torch.device("cpu")))
    by_triton(monkeypatch, triton_device)
    for module, kernel in ((pair_sums, "rbf_minus_one"), (rbf, "rbf_minus_one"), (laplacian, "laplacian_product")):
        monkeypatch.setattr(module, kernel, too_large)
    with pytest.warns(RuntimeWarning, match="Required: 245808"):
        actual = value_and_gradients(CALLS[name], operands(triton_device))
    for ours, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), wanted, rtol=2e-4, atol=2e-5)
