"""Which attention kernel is fastest here? Asked once for each situation, answered by a stopwatch, and remembered.

A stopwatch is not a function of the run, and two kernels differ in their last bits. So that a run which is stopped and
started again computes the same numbers, the answer is written into a file of this machine (`memory_file`), where every
later start and every other rank finds it; and a kernel later in the list of preferences has to be faster by MARGIN.
"""

import fcntl
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimir_fast import _native
from mimir_fast.layers.kernels import CANDIDATES, Candidate, Situation
from mimir_fast.versions import cpu_name, version_of

MARGIN = 0.1
# The batch of the measurement, whatever the run's: one answer for a last short batch and for any number of ranks.
BATCH = {"cpu": 16, "cuda": 256}
LARGEST_TENSOR = 2**25  # numbers; longer sequences are measured on fewer images
ROUNDS = 5
HOPELESS = 3.0  # times the best: dropped early
CHANCES = 3  # calls before that; the first may have been disturbed, or have met memory the system still had to clear
SECONDS_A_ROUND = 2e-3

Seconds = dict[str, float]


def fastest(situation: Situation) -> tuple[str, Seconds]:
    """The chosen candidate's name and the seconds of a call of each that was measured here, now or earlier."""
    wanted = [c for c in CANDIDATES if c.takes(situation)]
    if situation.device.type not in BATCH or _capturing(situation.device):
        return "sdpa", {}  # nothing to measure with: meta tensors, or a CUDA graph being recorded
    with _memory() as memory:
        key = f"{situation}, {'/'.join(c.name for c in wanted)}"
        if key not in memory:
            memory[key] = _in_a_fresh_thread(lambda: measure(situation, wanted))
        seconds: Seconds = memory[key]
    return prefer(seconds), seconds


def prefer(seconds: Seconds) -> str:
    """The winner: a later candidate takes over only if it is faster than the present one by MARGIN."""
    best = ""
    for name in (c.name for c in CANDIDATES):
        if name in seconds and (not best or seconds[name] < (1 - MARGIN) * seconds[best]):
            best = name
    return best or "sdpa"


def measure(situation: Situation, candidates: Sequence[Candidate]) -> Seconds:
    """The least seconds a call of each candidate took in ROUNDS turns; without those that fail or are hopeless."""
    q, k, v, grad = _inputs(situation)

    def call_of(kernel: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], object]:
        def forward() -> object:
            with torch.no_grad():
                return kernel(q, k, v)

        return (lambda: torch.autograd.grad(kernel(q, k, v), (q, k, v), grad)) if situation.backward else forward

    calls: dict[str, Callable[[], object]] = {}
    seconds: Seconds = {}
    for candidate in candidates:
        call = call_of(candidate.run)
        try:
            _clock(call, situation.device)  # builds plans, fills caches
            seconds[candidate.name] = _clock(call, situation.device)
        except (RuntimeError, NotImplementedError, ValueError, ImportError):
            continue  # it does not take this shape, dtype or machine after all, or there is no memory for it
        calls[candidate.name] = call
    best = min(seconds.values(), default=0.0)
    for name, call in calls.items():
        for _ in range(CHANCES - 1):
            if seconds[name] > HOPELESS * best:
                seconds[name] = min(seconds[name], _clock(call, situation.device))
    calls = {name: call for name, call in calls.items() if seconds[name] <= HOPELESS * best}
    for _ in range(ROUNDS):  # in turns, so that a disturbance meets all of them
        for name, call in calls.items():
            repeats = min(20, max(1, round(SECONDS_A_ROUND / seconds[name])))
            seconds[name] = min(seconds[name], _clock(call, situation.device, repeats))
    return seconds


def _inputs(s: Situation) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v as a model has them, slices of its fused projections, and a gradient for the output."""
    rng = torch.Generator(s.device).manual_seed(0)
    batch = max(1, min(BATCH[s.device.type], LARGEST_TENSOR // (s.keys * s.heads * s.head_dim)))

    def tokens(*shape: int) -> Tensor:
        return torch.randn(shape, device=s.device, generator=rng).to(s.dtype)

    if s.queries == s.keys:
        q, k, v = tokens(batch, s.queries, 3, s.heads, s.head_dim).unbind(2)
    else:
        q = tokens(batch, s.queries, s.heads, s.head_dim)
        k, v = tokens(batch, s.keys, 2, s.heads, s.head_dim).unbind(2)
    grad = tokens(*q.shape)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad


def _clock(call: Callable[[], object], device: torch.device, repeats: int = 1) -> float:
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    if cuda:
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / repeats


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _in_a_fresh_thread(work: Callable[[], Seconds]) -> Seconds:
    """Autocast, inference mode, FLOP counters, fake tensors and saved-tensor hooks of the caller are its thread's."""
    result: Seconds = {}
    thread = threading.Thread(target=lambda: result.update(work()), name="attention choice")
    thread.start()
    thread.join()
    return result


# What is known in this process, and the file behind it.


def memory_file() -> Path:
    """Where this machine's answers lie: under $MIMIR_FAST_CACHE, else $XDG_CACHE_HOME or ~/.cache."""
    home = os.environ.get("MIMIR_FAST_CACHE")
    folder = Path(home) if home else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "mimir_fast"
    return folder.expanduser() / f"attention-{_machine()}-{torch.get_num_threads()}-threads.json"


@cache
def _machine() -> str:
    """Changes with whatever could change an answer, the number of threads apart."""
    library = _native.library()
    built = os.stat(library.__file__).st_mtime_ns if library is not None and library.__file__ else 0
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    instructions = torch.backends.cpu.get_cpu_capability(), _native.unit()
    known = [cpu_name(), gpu, torch.__version__, version_of("xformers"), built, instructions]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:12]


_remembered: dict[Path, dict[str, Any]] = {}


@contextmanager
def _memory() -> Iterator[dict[str, Any]]:
    """The answers so far, to read and add to; locked, so that the ranks of a machine measure one after another.

    Without a place to write, they live as long as the process.
    """
    path = memory_file()
    known = _remembered.setdefault(path, {})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115 (closed below; a failure to open must not hide the caller's errors)
    except OSError:
        yield known
        return
    with file:
        with suppress(OSError):  # a network disk may not know locks
            fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        before = _parse(file.read())
        known.update(before)
        yield known
        if known != before:
            file.seek(0)
            file.truncate()
            file.write(json.dumps(known, indent=1))


def _parse(text: str) -> dict[str, Any]:
    """The file's content; nothing if a process died while writing."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}
