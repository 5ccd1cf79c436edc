"""A process that has imported everything and forks one of our commands on request: 20 ms instead of ten seconds.

The children are real processes: they are killed, stopped, starved of disk and traced like any other. Nothing that
starts threads or computes runs in the parent, so a fork is as good as a new interpreter. What is read from the
environment on import (a processor, Triton's interpreter) cannot be given to a child: such a test starts a Python.

Run as a program it reads one JSON request a line and answers with one: `start` a command, `poll` a process.
"""

import atexit
import ctypes
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

CLONE_NEWNS, CLONE_NEWNET = 0x00020000, 0x40000000


def command_environment() -> dict[str, str]:
    """The environment of a command under test: CPU only, one thread, no rank of a group that the tests run in."""
    drop = ("TRITON_INTERPRET", "RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_JOB_ID")
    kept = {k: v for k, v in os.environ.items() if k not in drop}
    return kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


class Process:
    """One child of the zygote."""

    def __init__(self, zygote: "Zygote", pid: int, stdout: Path, stderr: Path) -> None:
        self.zygote, self.pid, self.stdout, self.stderr = zygote, pid, stdout, stderr

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        code = self.zygote.ask({"poll": self.pid})
        return None if code is None else int(code)

    def wait(self, timeout: float) -> int:
        """The exit code.

        Raises:
            TimeoutError: it still runs; the output is in the message.
        """
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"process {self.pid} still ran after {timeout} s:\n{self.said()}")
            time.sleep(0.02)
        return code

    def signal(self, number: int) -> bool:
        """Send a signal, if it still runs; whether it did."""
        alive = self.poll() is None
        if alive:
            os.kill(self.pid, number)
        return alive

    def kill(self) -> None:
        """SIGKILL to it and what it started."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)

    def said(self) -> str:
        """stdout and stderr so far."""
        paths = sorted({self.stdout, self.stderr}, reverse=True)
        return "".join(path.read_text(errors="replace") for path in paths if path.exists())


class Zygote:
    """Starts processes; one for a whole test session.

    Args:
        folder: for the children's output.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._count = folder, 0
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=command_environment(),
        )  # fmt: skip
        self.ask({"ready": True})

    def ask(self, request: dict[str, Any]) -> Any:
        """One request, one answer."""
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(
        self, module: str, args: Sequence[str], *, env: dict[str, str] | None = None, cwd: Path | None = None,
        setup: str = "", netns: str = "", paused: bool = False, output: Path | None = None, apart: bool = False,
    ) -> Process:  # fmt: skip
        """Fork a process that runs `python -m MODULE ARGS`.

        Args:
            env: added to the zygote's environment.
            setup: shell commands run first, in a mount namespace of the process's own.
            netns: the network namespace it lives in (as `ip netns` names it).
            paused: it stops itself (SIGSTOP) before it begins, so that a tracer can be attached.
            output: the file for what it prints; one of the zygote's own by default.
            apart: stderr goes into a file of its own.
        """
        self._count += 1
        stdout = output or self.folder / f"out-{self._count:05d}.txt"
        stderr = stdout.with_suffix(".stderr") if apart else stdout
        request = {
            "start": module, "args": list(args), "env": env or {}, "cwd": str(cwd or Path.cwd()), "setup": setup,
            "netns": netns, "paused": paused, "stdout": str(stdout), "stderr": str(stderr),
        }  # fmt: skip
        return Process(self, self.ask(request), stdout, stderr)

    def start_ranks(self, module: str, args: Sequence[str], hosts: Sequence[dict[str, Any]]) -> list[Process]:
        """One process for each of `hosts` (what `start` takes, and as `extra` words for one alone), as one group."""
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(len(hosts))}
        processes = []
        for rank, options in enumerate(hosts):
            env = group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | (options.get("env") or {})
            own = {name: value for name, value in options.items() if name != "extra"}
            processes.append(self.start(module, [*args, *options.get("extra", ())], **{**own, "env": env}))
        return processes

    def close(self) -> None:
        """End the server; its children are the caller's to end."""
        if self._server.stdin is not None:
            self._server.stdin.close()
        self._server.wait(timeout=30)


def _child(request: dict[str, Any]) -> None:
    """What the forked process does; never returns."""
    os.setsid()
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # the tests may be a job in the background, which ignores it
    if priority := os.nice(0):  # a new session begins at the usual one
        with suppress(OSError):
            Path("/proc/self/autogroup").write_text(str(priority))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(request["stdout"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 1)
    apart = request["stderr"] != request["stdout"]
    os.dup2(os.open(request["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644) if apart else 1, 2)
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    # As `python -m` does.
    sys.path[:1] = [request["cwd"], *filter(None, request["env"].get("PYTHONPATH", "").split(os.pathsep))]
    libc = ctypes.CDLL(None, use_errno=True)
    code = 99
    try:
        if request["netns"]:
            namespace = os.open(f"/run/netns/{request['netns']}", os.O_RDONLY)
            assert libc.setns(namespace, CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        if request["setup"]:
            assert libc.unshare(CLONE_NEWNS) == 0, os.strerror(ctypes.get_errno())
            subprocess.run(["mount", "--make-rprivate", "/"], check=True)
            subprocess.run(["sh", "-ec", request["setup"]], check=True)
        if request["paused"]:
            os.kill(os.getpid(), signal.SIGSTOP)
        sys.argv = [request["start"], *request["args"]]
        sys.modules.pop(request["start"], None)
        runpy.run_module(request["start"], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        _leave(code)


def _leave(code: int) -> None:
    """As the interpreter ends: threads are joined, what was registered is called, what is printed is flushed."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        code = 120
    os._exit(code)


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _serve() -> None:
    import torch
    import torch._dynamo  # torch imports it with the first call of any custom op
    import torch.distributed.checkpoint
    import torch.distributed.checkpoint.hf_storage
    import torch.utils.tensorboard  # noqa: F401

    import mimir_fast.evaluate
    import mimir_fast.finetune
    import mimir_fast.models.families
    import mimir_fast.pretrain
    import mimir_fast.training.session

    for name in (
        "sklearn.datasets",
        "safetensors.torch",
        "matplotlib.figure",
        "PIL.Image",
        "torchvision.transforms.v2",
    ):
        __import__(name)
    # What commands import when they know what they are to do.
    mimir_fast.pretrain.config_from(["--recipe", "digits/mimir_vit_nano"])
    mimir_fast.finetune.config_from(["--recipe", "digits/pgd_vit_nano"])
    codes: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        answer: Any = True
        if "start" in request:
            answer = os.fork()
            if answer == 0:
                _child(request)
        elif "poll" in request:
            pid = request["poll"]
            if pid not in codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            answer = codes.get(pid)
        print(json.dumps(answer), flush=True)
    os._exit(0)  # nothing to clean up, and tearing torch down takes seconds


if __name__ == "__main__":
    _serve()
