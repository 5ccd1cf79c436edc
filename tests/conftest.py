"""Fixtures all tests share, and a header that says which backends this run really exercised.

MIMIR_FAST_REQUIRE=native,triton,dali makes a missing backend an error instead of lost coverage.
"""

import gc
import os
import shutil
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from commands import Command, run_module

if TYPE_CHECKING:
    from mimir_fast.evaluation.images import EvaluationImages

if not torch.cuda.is_available():
    # Before any kernel module is imported: the decorator decides then. A GPU runs the kernels themselves.
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Small problems, many processes (pytest-xdist): one thread each is fastest, and sums are reproducible.
THREADS = os.environ.setdefault("MIMIR_FAST_TEST_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", THREADS)
torch.set_num_threads(int(THREADS))
# A stopwatch must not decide which kernel a test runs.
os.environ.setdefault("MIMIR_FAST_ATTENTION", "native")

REQUIRABLE = {"native": "C++ ops (mimir_fast._C)", "triton": "Triton kernels", "dali": "DALI", "cuda": "CUDA"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def tools() -> dict[str, str]:
    """What only tests and evaluation use: name → `yes`, or `no: …` with what to type."""
    found = {
        name: "yes" if find_spec(module) else f"no: pip install {package}"
        for name, module, package in (
            ("pyautoattack", "pyautoattack", "pyautoattack"),
            ("torchattacks", "torchattacks", "torchattacks"),
            ("peft", "peft", "peft"),
            ("onnx", "onnxruntime", "onnx onnxscript onnxruntime"),
            ("transformers", "transformers", "transformers"),
            ("frost", "imagecorruptions", "--no-deps imagecorruptions"),
            ("mkdocs", "mkdocstrings", "'.[docs]'"),
            ("notebooks", "nbclient", "nbclient nbformat ipykernel"),
        )
    }
    found["chromium"] = "yes" if any(map(shutil.which, BROWSERS)) else "no: apt-get install chromium"
    found["axe"] = (
        "yes" if axe_core() else "no: npm install axe-core, and MIMIR_FAST_AXE=…/axe.min.js if it lies elsewhere"
    )
    return found


def axe_core() -> Path | None:
    """The accessibility checker's one file: MIMIR_FAST_AXE, or in node_modules here or above."""
    named = os.environ.get("MIMIR_FAST_AXE")
    places = [Path(named)] if named else [p / "node_modules/axe-core/axe.min.js" for p in Path(__file__).parents]
    return next((path for path in places if path.is_file()), None)


def pytest_report_header(config: pytest.Config) -> list[str]:
    """One line a backend."""
    from mimir_fast.info import backends

    return [f"{name}: {state}" for name, state in (backends() | tools()).items()]


def pytest_sessionstart(session: pytest.Session) -> None:
    """Stop when a backend that must be here is not, or when groups of tests would be torn apart."""
    if session.config.getoption("dist", "no") == "loadgroup" and not hasattr(pytest.Item, "_nodeid"):
        raise pytest.UsageError(
            f"pytest-xdist marks no groups with pytest {pytest.__version__}, so each worker would make what a module "
            "shares: make setup"
        )
    from mimir_fast.info import backends

    known = REQUIRABLE | {name: name for name in tools()}
    states = backends() | tools()
    for name in filter(None, os.environ.get("MIMIR_FAST_REQUIRE", "").split(",")):
        if name not in known:
            raise pytest.UsageError(f"MIMIR_FAST_REQUIRE={name}: wanted some of {','.join(known)}")
        if states[known[name]].startswith("no"):
            raise pytest.UsageError(f"MIMIR_FAST_REQUIRE={name}: {states[known[name]]}")


def shared_by(item: pytest.Item) -> list[Sequence[pytest.FixtureDef[object]]]:
    """The definitions of each fixture of a test, the one in force last."""
    info = getattr(item, "_fixtureinfo", None)
    return [] if info is None else [found for found in info.name2fixturedefs.values() if found]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`cuda` tests need a GPU; `slow` ones are asked for by `-m slow`."""
    asked_for = config.getoption("-m") or ""
    for item in items:
        # Where there is a GPU, these run on it instead of in the interpreter: `-m cuda` must find them.
        if "triton_device" in getattr(item, "fixturenames", ()) and torch.cuda.is_available():
            item.add_marker(pytest.mark.cuda)
        # One worker makes what a whole module shares (Makefile: --dist loadgroup); else every worker makes it.
        if any(found[-1].scope in ("module", "class") for found in shared_by(item)):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        if item.get_closest_marker("slow") and "slow" not in asked_for:
            item.add_marker(pytest.mark.skip(reason="long; run with -m slow"))


def pytest_collection_finish() -> None:
    """A garbage collection need not walk what stays to the end."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """The same random numbers whichever tests ran before in this process, its fixtures' included."""
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device this machine could have."""
    return torch.device(request.param)


@pytest.fixture
def triton_device() -> torch.device:
    """The GPU where there is one; otherwise the CPU, where Triton's interpreter runs the kernel."""
    pytest.importorskip("triton")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def no_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no launcher had started the tests: within a Slurm job a folder that they made is its own launch's."""
    for variable in (
        "MIMIR_FAST_LAUNCH_ID", "SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT",
        "TORCHELASTIC_RUN_ID",
    ):  # fmt: skip
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """`command("mimir_fast.info", "--flag", ranks=2)` runs a module of ours as a user would, in an empty folder."""
    return partial(run_module, tmp_path)


@pytest.fixture(scope="session")
def small_model() -> torch.nn.Module:
    """A small robust classifier of 8 × 8 digits; all tests of a process share it, so leave it as it is."""
    from small_classifier import train_small

    return train_small()


@pytest.fixture(scope="session")
def digits_images() -> "EvaluationImages":
    """The 300 test digits at 8 × 8."""
    from small_classifier import DIGITS

    from mimir_fast.evaluation.images import load_images

    return load_images(DIGITS)
