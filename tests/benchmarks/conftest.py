"""A case small enough to reason about, and records without a machine."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import disturbance
from benchmarks.case import Case, Provider
from benchmarks.record import Record


def square(x: torch.Tensor) -> tuple[torch.Tensor]:
    """The definition of the tests' op."""
    return (x * x,)


@pytest.fixture(autouse=True)
def nobody_else(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Other tests run beside these, and whether they disturb is chance; test_disturbance.py looks at the real thing."""
    if request.path.name != "test_disturbance.py":
        monkeypatch.setattr(disturbance, "PROC", tmp_path / "no-proc")


@pytest.fixture
def squares() -> Callable[..., Case]:
    """`squares(provider, …)`: x², which the first provider and the baseline get right."""

    def build(*more: Provider, **changes: object) -> Case:
        options: dict[str, object] = {
            "make_inputs": lambda: torch.rand(16) + 1,
            "reference": lambda x: square(x.double()),
            "tolerance": 1e-6,
            "bytes": 128.0,
        }
        providers = [Provider("mimir_fast", lambda x: (x.square(),)), Provider("eager", square), *more]
        options |= {"params": {"n": 16}, "baseline": "eager"} | changes
        return Case("square", providers=providers, **options)  # type: ignore[arg-type]

    return build


@pytest.fixture
def timed() -> Callable[..., Record]:
    """`timed(2.0)`: the record of a run of 2 ms with 2 % of noise."""

    def build(median: float, *, status: str = "ok", cpu: str = "a CPU", impl: str = "mimir_fast") -> Record:
        ms = {"median": median, "p20": median * 0.98, "p80": median * 1.02, "noise": 0.02}
        hw = {"cpu": cpu, "threads": 2}
        return Record("square", impl, {"n": 16}, 0.1, status=status, ms=ms, hw=hw)  # type: ignore[arg-type]

    return build
