"""Running our modules as a user would: another process, CPU only, one thread, real kernels' definitions."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Command = Callable[..., subprocess.CompletedProcess[str]]


def command_line(module: str, *args: str, ranks: int = 1) -> list[str]:
    """The words of `python -m MODULE …`, under torchrun for several ranks."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return [sys.executable, *torchrun, "-m", module, *args]


def command_environment() -> dict[str, str]:
    """The environment of a command under test."""
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run_module(
    folder: Path, module: str, *args: str, ranks: int = 1, timeout: float = 300, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run to the end in `folder`; the caller looks at returncode, stdout and stderr."""
    line = command_line(module, *args, ranks=ranks)
    return subprocess.run(
        line, cwd=folder, capture_output=True, text=True, timeout=timeout, env=command_environment(), **options
    )
