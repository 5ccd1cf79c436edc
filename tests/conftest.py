"""Fixtures all tests share, and a header that says which backends this run really exercised."""

import os

import pytest
import torch

# Small problems, many processes (pytest-xdist): one thread each is fastest and makes sums reproducible.
torch.set_num_threads(int(os.environ.get("MIMIR_FAST_TEST_THREADS", "1")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`cuda` tests need a GPU; `slow` ones are asked for by `-m slow`."""
    asked_for = config.getoption("-m") or ""
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        if item.get_closest_marker("slow") and "slow" not in asked_for:
            item.add_marker(pytest.mark.skip(reason="long; run with -m slow"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device this machine could have."""
    return torch.device(request.param)


@pytest.fixture
def triton_device() -> torch.device:
    """The GPU where there is one; otherwise the CPU, where Triton's interpreter runs the kernel."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU: set TRITON_INTERPRET=1 before pytest starts to interpret the kernels")
    return torch.device("cpu")
