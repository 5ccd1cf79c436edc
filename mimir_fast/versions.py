"""Versions, machine and commit: recorded with every number this package writes down."""

import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

# Distribution names, as the package index knows them.
PACKAGES = (
    "mimir-fast", "torch", "torchvision", "timm", "triton", "xformers", "nvidia-dali-cuda130", "nvidia-dali-cuda120",
    "apex", "safetensors", "tyro", "tensorboard", "webdataset", "scikit-learn", "pyautoattack",
)  # fmt: skip


COMPLETION_HINT = "--print_completion bash|zsh prints what a shell needs to complete mimir-fast."


def version_of(package: str) -> str | None:
    """The installed version of a distribution; None when it is absent."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def software() -> dict[str, str | None]:
    """Python, this code and the packages that a result depends on, by name, with their versions."""
    computing = [package for package in PACKAGES if package not in ("tensorboard", "pyautoattack")]
    versions = {f"the version of {package}": version_of(package) for package in computing}
    return {"the version of Python": platform.python_version(), "the commit": commit(), **versions}


def environment() -> dict[str, Any]:
    """Plain values that say where a number was made."""
    return {
        "python": platform.python_version(),
        "packages": {package: version_of(package) for package in PACKAGES},
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": commit(),
    }


def commit() -> str | None:
    """The commit this package runs from, `-dirty` when the tree differs; None outside of a checkout."""
    try:
        text = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=Path(__file__).resolve().parent, capture_output=True, text=True, timeout=10, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return text or None


def python_command() -> str:
    """What to type for this Python: `python` where a shell would find it, else its path, such as .venv/bin/python."""
    python = Path(sys.executable).with_name("python")
    found = shutil.which("python")
    if found and Path(found).absolute() == python:
        return "python"
    return str(python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python)


def called_as(prog: str) -> str:
    """The program's name in messages: `prog`, or `mimir-fast COMMAND` when it was started so."""
    return sys.argv[0] if sys.argv[0].startswith("mimir-fast ") else prog


def cpu_name() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
