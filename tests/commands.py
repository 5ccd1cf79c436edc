"""Running our modules as a user would: another process, CPU only, one thread, real kernels' definitions."""

import atexit
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from zygote import Process, Zygote, command_environment

Command = Callable[..., subprocess.CompletedProcess[str]]


def command_line(module: str, *args: str, ranks: int = 1) -> list[str]:
    """The words of `python -m MODULE …`, under torchrun for several ranks."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return [sys.executable, *torchrun, "-m", module, *args]


@cache
def zygote() -> Zygote:
    """This process's own."""
    folder = tempfile.TemporaryDirectory(prefix="mimir-fast-commands-")
    started = Zygote(Path(folder.name))
    atexit.register(folder.cleanup)
    atexit.register(started.close)
    return started


def run_code(folder: Path, code: str, *args: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """Run a program of a test's own in `folder`: as `python -c` would, but with the package imported already."""
    return run_module(folder, _written(folder, code), *args, ranks=ranks)


def start_code(folder: Path, code: str, *args: str, **variables: str) -> Process:
    """Start it with these in its environment: to be looked at, signalled and killed."""
    return start_module(folder, _written(folder, code), *args, **variables)


def _written(folder: Path, code: str) -> str:
    (folder / "own_program.py").write_text(code)
    return "own_program"


def start_module(folder: Path, module: str, *args: str, **variables: str) -> Process:
    """Start it in `folder`: to be looked at, signalled and killed."""
    return zygote().start(module, args, cwd=folder, apart=True, env=command_environment() | variables)


def run_module(
    folder: Path, module: str, *args: str, ranks: int = 1, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run to the end in `folder`; the caller looks at returncode, stdout and stderr.

    Several ranks are one group without torchrun, whose own part is tested in training/test_elastic.py.
    """
    hosts = [{"cwd": folder, "apart": True, "env": command_environment()} for _ in range(ranks)]
    processes = zygote().start_ranks(module, args, hosts) if ranks > 1 else [start_module(folder, module, *args)]
    try:
        codes = [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    code = next(filter(None, codes), 0)
    out, err = ("".join(getattr(p, name).read_text() for p in processes) for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess([module, *args], code, out, err)
