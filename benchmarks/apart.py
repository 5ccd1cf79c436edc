"""A rival in a process of its own, as its users run it: without the settings that our training makes for its process.

Calls alternate with those of the providers here, and the process that does not compute sleeps. Batches and outputs go
through shared memory. Python's garbage collector waits until a call is over, as it does here (timing.py).
"""

import gc
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.case import Outputs
from benchmarks.memory import give_back


class Apart:
    """`build(*arguments, **options)` made in another process, to be called from here.

    Attributes:
        pid: of that process.

    Raises:
        RuntimeError: what went wrong over there, from the call concerned.
    """

    def __init__(self, build: Callable[..., Callable[..., Outputs]], *arguments: Any, **options: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        work = (theirs, torch.get_num_threads(), build, arguments, options)
        self._process = context.Process(target=_serve, args=work, daemon=True)
        self._process.start()
        self._answer()
        self.pid = self._process.pid

    def __call__(self, *inputs: Any) -> Outputs:
        self._pipe.send(inputs)
        return self._answer()

    def give_back(self) -> None:
        """Return that process's free memory to the system, so that the next call's use of it is seen."""
        self._pipe.send(None)
        self._answer()

    def _answer(self) -> Outputs:
        failed, answer = self._pipe.recv()
        if failed:
            raise RuntimeError(answer)
        return answer


def _serve(pipe: Connection, threads: int, build: Callable[..., Any], arguments: Any, options: Any) -> None:
    torch.set_num_threads(threads)
    gc.disable()
    try:
        function = build(*arguments, **options)
        pipe.send((False, ()))
        while True:
            gc.collect()
            gc.freeze()  # what lives on is not walked again: the next collection takes no time from who computes now
            inputs = pipe.recv()
            if inputs is None:
                give_back()
            pipe.send((False, () if inputs is None else function(*inputs)))
    except EOFError:
        return
    except Exception as error:  # whatever it is, it must reach the one who waits
        pipe.send((True, f"{type(error).__name__}: {error}"))
