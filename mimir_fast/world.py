"""This process among all of them. They speak with one voice: a result or a failure of one becomes everybody's.

`on_main` and `together` are how anything that can fail is done while others wait. Without them an exception on one
rank leaves the rest in a collective until its timeout.
"""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mimir_fast.allocator import keep_large_buffers

T = TypeVar("T")

# Building an index or the first compilation can take long on one rank while the others wait; `watchdog` is stricter.
PATIENCE = timedelta(minutes=60)
_JOINING = timedelta(minutes=10)  # torchrun has gathered the hosts before: what is left is starting Python
_NOTICE = 30.0  # seconds


class RunFailed(RuntimeError):
    """A run cannot go on; the message says all there is to say, so a command prints it without a traceback."""


class FailedElsewhere(RunFailed):
    """Another rank failed, and this one leaves with it."""


@dataclass(frozen=True)
class World:
    """This process among all of them.

    Attributes:
        rank, size: which one of how many.
        device: where its tensors live.
        group: the gloo group its agreements go through; None is the default one.
    """

    rank: int
    size: int
    device: torch.device
    group: Any = None

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes logs and pictures."""
        return self.rank == 0

    @property
    def name(self) -> str:
        """`rank 3 (pid 4711 on node17)`, for messages."""
        return f"rank {self.rank} (pid {os.getpid()} on {socket.gethostname()})"

    def together(self, fn: Callable[[], T]) -> list[T]:
        """Run `fn` on every rank; all results, by rank. Collective.

        Raises:
            Exception: this rank's own failure.
            FailedElsewhere: another rank's; names the first that failed and what it said.
        """
        mine, failure = _attempt(fn)
        if self.size == 1:
            return [_unless(failure, mine)]
        said = None if failure is None else f"{self.name} failed: {type(failure).__name__}: {failure}"
        outcomes: list[Any] = [None] * self.size
        dist.all_gather_object(outcomes, (mine, said), group=self.group)
        failures = [said for _, said in outcomes if said is not None]
        _unless(failure, None)
        if failures:
            raise FailedElsewhere(failures[0])
        return [value for value, _ in outcomes]

    def on_main(self, fn: Callable[[], T]) -> T:
        """Run `fn` on the main rank only; its result on every rank. Collective.

        Raises:
            Exception: what `fn` raised, on the main rank.
            FailedElsewhere: the same, on the others.
        """
        return self.together(fn if self.is_main else _nothing)[0]

    def agree(self, values: Callable[[], dict[str, Any]]) -> None:
        """Compare what must be the same on all ranks; one alone does not ask for it. Collective.

        Raises:
            RunFailed: it is not; names the first value that differs, and on which ranks of which hosts.
        """
        if self.size == 1:
            return
        (first, wanted), *others = self.together(lambda: (self.name, values()))
        for name, found in others:
            for key in sorted(wanted.keys() | found.keys()):
                if found.get(key) != wanted.get(key):
                    raise RunFailed(
                        f"{key} is {wanted.get(key)!r} on {first}, and {found.get(key)!r} on {name}: start all ranks "
                        "with the same command line, code and data"
                    )

    def separate(self) -> "World":
        """The same processes with a gloo group of their own, for a thread whose collectives cross the main one's."""
        return World(self.rank, self.size, self.device, dist.new_group(backend="gloo") if self.size > 1 else None)


def chosen(device: str) -> str:
    """`auto` as what this machine has, cuda or cpu; any other device as it is."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def start_world(device: str = "auto") -> World:
    """Join the processes torchrun started (gloo for CPU tensors, NCCL for CUDA), or be alone.

    Raises:
        ValueError: a CUDA device is asked for and there is none, or a launcher started several processes that do not
            know each other.
    """
    refuse_strangers()
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}, but torch sees no CUDA GPU here: use --device cpu (or leave it at auto)")
    kind = chosen(device).split(":")[0]
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if kind == "cuda":
        local = torch.device(device if ":" in device else f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
        torch.cuda.set_device(local)
    else:
        keep_large_buffers()
        local = torch.device(kind)
    if size > 1 and not dist.is_initialized():
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # the flight recorder: what `watchdog` writes on a hang
        # CPU tensors go through gloo also on GPU machines: agreeing on a signal must not wait for the GPU.
        _join("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", rank, size)
    return World(rank, size, local)


def _join(backend: str, rank: int, size: int) -> None:
    """Meet the other processes and form the default group; says after a while for whom it waits.

    Raises:
        RunFailed: they did not come.
    """
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    waits = f"rank {rank} waits at {where} for the others of {size} processes (WORLD_SIZE={size})"
    notice = threading.Timer(_NOTICE, lambda: print(f"{waits} …", file=sys.stderr, flush=True))
    notice.daemon = True
    notice.start()
    try:
        with _ctrl_c_ends():
            store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=_JOINING))
            store.set_timeout(PATIENCE)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    except dist.DistError as error:
        raise RunFailed(
            f"{waits}, and not all came within {_JOINING}: {str(error).splitlines()[0]}. Start each of them (torchrun "
            "does), or unset RANK and WORLD_SIZE for one process"
        ) from error
    finally:
        notice.cancel()


@contextmanager
def _ctrl_c_ends() -> Iterator[None]:
    """Ctrl-C ends the process as SIGTERM does: Python's own handler would wait until a call of C++ returns."""
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def refuse_strangers() -> None:
    """A scheduler that started this command N times without a process group would train N runs in one folder.

    Raises:
        ValueError: that is so.
    """
    if "WORLD_SIZE" in os.environ:
        return
    for launcher, variable in (
        ("srun", "SLURM_STEP_NUM_TASKS"),
        ("mpirun", "OMPI_COMM_WORLD_SIZE"),
        ("mpiexec", "PMI_SIZE"),
    ):
        tasks = os.environ.get(variable, "1")
        if tasks.isdigit() and int(tasks) > 1:
            raise ValueError(
                f"{launcher} started {tasks} copies of this command ({variable}={tasks}), but they form no process "
                "group: start torchrun once a node instead (srun --ntasks-per-node=1 torchrun --nproc_per_node=… -m "
                f"mimir_fast.pretrain …, see launch/slurm.sbatch); for one process, unset {variable}"
            )


def stop_world() -> None:
    """Leave the process group, if one was joined. Not after a failure: peers may be waiting in a collective."""
    if dist.is_initialized():
        dist.destroy_process_group()


def leave_at_once(code: int) -> NoReturn:
    """End this process now when others may wait for it, so that torchrun learns; otherwise as usual.

    Python joins its threads on the way out, and one of them may sit in a collective that nobody answers.
    """
    if dist.is_initialized():
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # a broken pipe has nobody left to read it
                stream.flush()
        os._exit(code)
    raise SystemExit(code)


def drop_unread() -> None:
    """A closed stdout pipe (`| head -1`) does not change the exit status: flush, and print to nowhere from here on.

    Without this Python's own flush at the end fails, and the exit status of a good run is 120.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def mean_over_ranks(values: Tensor) -> Tensor:
    """Elementwise mean of a tensor over all ranks."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def _attempt(fn: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return fn(), None
    except Exception as error:
        return None, error


def _unless(failure: Exception | None, value: Any) -> Any:
    if failure is not None:
        raise failure
    return value


def _nothing() -> Any:
    return None
