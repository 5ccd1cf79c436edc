"""Versions, machine and commit: recorded with every number this package writes down."""

import os
import platform
import re
import shlex
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


def dali_package() -> str:
    """NVIDIA's DALI for the CUDA of this torch; the package `nvidia-dali` is an empty placeholder."""
    return f"nvidia-dali-cuda{'120' if (torch.version.cuda or '').startswith('12.') else '130'}"


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


def install_command(extra: str) -> str:
    """What to type for the packages of an extra of ours, without asking an index for a package of our name: anybody may
    register that there."""
    root = Path(__file__).resolve().parents[1]
    if (root / "pyproject.toml").is_file():  # a checkout, which knows its extras
        return f"pip install -e {shlex.quote(f'{root}[{extra}]')}"
    found = _requirements(extra)
    return shlex.join(["pip", "install", *found]) if found else f"pip install '.[{extra}]' in its source folder"


def _requirements(extra: str) -> list[str]:
    """The requirements of an extra as the installed package has them, those of the extras it names included."""
    found: list[str] = []
    for line in metadata.requires("mimir-fast") or []:
        requirement, _, marker = line.partition(";")
        if not re.search(rf"extra == ['\"]{re.escape(extra)}['\"]", marker):
            continue
        own = re.fullmatch(r"mimir-fast\[(.*)\]", requirement.strip())
        found += [name for part in own[1].split(",") for name in _requirements(part)] if own else [requirement.strip()]
    return found


def environment() -> dict[str, Any]:
    """Plain values that say where a number was made."""
    return {
        "python": platform.python_version(),
        "packages": {package: version_of(package) for package in PACKAGES},
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY"),
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
