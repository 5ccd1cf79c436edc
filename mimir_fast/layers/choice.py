"""Which attention kernel is fastest here? Asked once for each situation, answered by a stopwatch, and remembered.

A stopwatch is not a function of the run, and two kernels differ in their last bits. So that a run which is stopped and
started again computes the same numbers, the answer is written into a file of this machine (`memory_file`), where every
later start and every other rank finds it; and a kernel later in the list of preferences has to be faster by MARGIN.
Of ranks that measure at the same time, the first to write decides for all. None waits for another's device: collectives
of a sharded model could wait for them both.
"""

import fcntl
import hashlib
import json
import os
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimir_fast import _native
from mimir_fast.layers.kernels import CANDIDATES, Candidate, Kernel, Situation
from mimir_fast.layers.native_attention import native_attention_reference
from mimir_fast.versions import cpu_name, version_of

MARGIN = 0.1
# The batch of the measurement, whatever the run's: one answer for a last short batch and for any number of ranks.
BATCH = {"cpu": 16, "cuda": 256}
LARGEST_TENSOR = 2**25  # numbers; longer sequences are measured on fewer images
ROUNDS = 5
HOPELESS = 3.0  # times the best: dropped early
CHANCES = 3  # calls before that; the first may have been disturbed, or have met memory the system still had to clear
SECONDS_A_ROUND = 2e-3
CHECKED = 2  # images, the last ones of the batch
# How far results may lie from the exact ones, relatively: room for any rounding (TF32 too), not for a wrong kernel.
TOLERANCE = {torch.float32: 0.01, torch.float64: 0.01}
TOLERANCE_OF_HALF = 0.05

Seconds = dict[str, float]


def fastest(situation: Situation) -> tuple[str, Seconds]:
    """The chosen candidate's name and the seconds of a call of each that was measured here, now or earlier."""
    wanted = [c for c in CANDIDATES if c.takes(situation)]
    if situation.device.type not in BATCH or _capturing(situation.device):
        return "sdpa", {}  # nothing to measure with: meta tensors, or a CUDA graph being recorded
    key = f"{situation}, {'/'.join(c.name for c in wanted)}"
    known = _recall()
    if key not in known:
        try:
            seconds = _in_a_fresh_thread(lambda: measure(situation, wanted))
        except Exception as error:
            warnings.warn(f"attention was not measured ({error}): PyTorch's choice serves this run", stacklevel=2)
            seconds = {}
        if not seconds:
            return "sdpa", {}  # the next start asks again
        known = _remember(key, seconds)
    found: Seconds = known[key]
    return prefer(found), found


def prefer(seconds: Seconds) -> str:
    """The winner: a later candidate takes over only if it is faster than the present one by MARGIN."""
    best = ""
    for name in (c.name for c in CANDIDATES):
        if name in seconds and (not best or seconds[name] < (1 - MARGIN) * seconds[best]):
            best = name
    return best or "sdpa"


def measure(situation: Situation, candidates: Sequence[Candidate]) -> Seconds:
    """The least seconds a call of each candidate took in ROUNDS turns; without those that fail, err or are hopeless."""
    inputs = _inputs(situation)
    backward = situation.backward
    exact = _results(native_attention_reference, [t[-CHECKED:].detach().float() for t in inputs], True)

    def call_of(kernel: Kernel) -> Callable[[], object]:
        return lambda: _results(kernel, inputs, backward)

    calls: dict[str, Callable[[], object]] = {}
    seconds: Seconds = {}
    for candidate in candidates:
        call = call_of(candidate.run)
        try:
            # The first call builds plans and fills caches.
            if not _agree(_results(candidate.run, inputs, backward), exact):
                warnings.warn(f"attention by {candidate.name} is wrong here ({situation}): not used", stacklevel=2)
                continue
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


def _results(kernel: Kernel, inputs: Sequence[Tensor], backward: bool) -> tuple[Tensor, ...]:
    """The output, and with `backward` the gradients."""
    *tokens, grad = inputs
    if not backward:
        with torch.no_grad():
            return (kernel(*tokens),)
    tokens = [t.requires_grad_() for t in tokens]
    out = kernel(*tokens)
    return out.detach(), *torch.autograd.grad(out, tokens, grad)


def _agree(results: Sequence[Tensor], exact: Sequence[Tensor]) -> bool:
    """Whether the last images' results are the exact ones up to rounding, beside the largest of them."""
    allowed = TOLERANCE.get(results[0].dtype, TOLERANCE_OF_HALF) * max(float(wanted.norm()) for wanted in exact)
    pairs = zip(results, exact, strict=False)  # only the output, where no gradients are asked for
    return all(float((found[-CHECKED:].float() - wanted).norm()) <= allowed for found, wanted in pairs)


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
    future: Future[Seconds] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="attention choice").start()
    return future.result()


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


def _recall() -> dict[str, Any]:
    """The answers of this machine so far."""
    path = memory_file()
    known = _remembered.setdefault(path, {})
    with suppress(OSError):  # there is none yet
        known.update(_parse(path.read_text()))
    return known


def _remember(key: str, seconds: Seconds) -> dict[str, Any]:
    """Add an answer, unless another process was faster: then its answer counts. All answers as they are now.

    Without a place to write, they live as long as the process.
    """
    path, known = memory_file(), _recall()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115 (closed below; a failure to open must not hide other errors)
    except OSError:
        known.setdefault(key, seconds)
        return known
    with file:
        with suppress(OSError):  # a network disk may not know locks
            fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        known.update(_parse(file.read()))
        if key not in known:
            known[key] = seconds
            file.seek(0)
            file.truncate()
            file.write(json.dumps(known, indent=1))
    return known


def _parse(text: str) -> dict[str, Any]:
    """The file's content; nothing if a process died while writing."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}
