"""What is done to a running process, and what is done to its files while it is down. Each returns what to look for."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from chaos.runs import PATIENCE, Job, Runs, wait_until_random_moment, whole_checkpoints
from chaos.zygote import Process

# At the entry of one of these the process is killed: within renaming, syncing, writing, listing, deleting, talking.
RENAME, BUSY = "rename,renameat,renameat2", ("write", "openat", "close")
SYSCALLS = (RENAME, "fsync", "unlink,unlinkat,rmdir", "mkdir", "pwrite64", "symlink,symlinkat", *BUSY)

Disturb = Callable[[Runs, Path, Job, random.Random], Process]


def kill(runs: Runs, run: Path, job: Job, rng: random.Random) -> Process:
    """kill -9 at a random moment."""
    process = runs.start(run, job=job)
    wait_until_random_moment(process, run, rng)
    process.kill()
    assert process.wait(PATIENCE) in (-signal.SIGKILL, 0)
    return process


def kill_in_syscall(runs: Runs, run: Path, job: Job, rng: random.Random) -> Process:
    """kill -9 inside a random system call, by strace."""
    names = rng.choice(SYSCALLS)
    when = rng.randint(1, 1500 if names in BUSY else 60)
    code, process = _inject(runs, run, job, rng, names, f"signal=KILL:when={when}")
    assert code in (-signal.SIGKILL, 0), process.said()
    return process


def fail_syscall(runs: Runs, run: Path, job: Job, rng: random.Random) -> Process:
    """A system call says that the disk is full or broken: survived by another try, or one line and exit code 2."""
    names = rng.choice(("fsync", RENAME, "mkdir", "ftruncate", "unlink,unlinkat,rmdir"))
    error, when = rng.choice(("ENOSPC", "EIO")), rng.randint(1, 40)
    often = rng.choice(("", "+1")) if names == "fsync" else ""  # from then on all of them
    code, process = _inject(runs, run, job, rng, names, f"error={error}:when={when}{often}")
    said = process.said()
    assert code == 0 or (code == 2 and "error: " in said), f"{names} {error} {when}{often}: {code}: {said}"
    return process


def _inject(runs: Runs, run: Path, job: Job, rng: random.Random, names: str, what: str) -> tuple[int, Process]:
    """Exit code of a run that strace plays with."""
    process = runs.start(run, *_part(rng), job=job, paused=True)
    tracer = subprocess.Popen(
        ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={names}", "-e", f"inject={names}:{what}", "-p",
         str(process.pid)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not _traced(process.pid) and tracer.poll() is None:
        time.sleep(0.01)
    process.signal(signal.SIGCONT)
    code = process.wait(PATIENCE)
    tracer.wait(30)
    return code, process


def ask_to_stop(runs: Runs, run: Path, job: Job, rng: random.Random) -> Process:
    """SIGTERM, SIGHUP or SIGUSR1, also during the start: saved, exit code 0."""
    process = runs.start(run, job=job)
    wait_until_random_moment(process, run, rng)
    number = rng.choice((signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1))
    process.signal(number)
    code = process.wait(PATIENCE)
    # The first milliseconds after the fork are Python's own: no handler can be there yet.
    assert code == 0 or (code == -number and not process.said()), f"{code}: {process.said()}"
    return process


def stop_and_go_on(runs: Runs, run: Path, job: Job, rng: random.Random) -> Process:
    """SIGSTOP for half a second, as Ctrl-Z and fg."""
    process = runs.start(run, *_part(rng), job=job)
    wait_until_random_moment(process, run, rng)
    process.signal(signal.SIGSTOP)
    time.sleep(0.5)
    process.signal(signal.SIGCONT)
    assert process.wait(PATIENCE) == 0, process.said()
    return process


def start_twice(runs: Runs, run: Path, job: Job, rng: random.Random) -> Process:
    """A second start while the first one runs: refused with its name, the first is not disturbed."""
    first = runs.start(run, *_part(rng), job=job)
    deadline = time.monotonic() + PATIENCE
    while not (run / ".lock").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(rng.uniform(0.1, 0.3))
    second = runs.start(run, job=job)
    code = second.wait(PATIENCE)
    held = f"is in use by process {first.pid}" in second.said()
    assert (code == 2 and held) or first.poll() is not None, second.said()
    assert first.wait(PATIENCE) == 0, first.said()
    return first


def close_the_pipe(runs: Runs, run: Path, job: Job, rng: random.Random) -> Process:
    """`| head -1`: nobody reads the output any more."""
    reader, writer = os.pipe()
    link = Path(f"/proc/{os.getpid()}/fd/{writer}")
    process = runs.start(run, *_part(rng), job=job, output=link)
    os.read(reader, 1)  # by now the process has opened its end
    os.close(writer)
    os.close(reader)
    assert process.wait(PATIENCE) == 0, "a closed pipe ended the run"
    return process


def _part(rng: random.Random) -> list[str]:
    """So that a start which survives its fault leaves some steps for the next one."""
    return ["--stop_after", str(rng.randint(1, 4))]


PROCESS_FAULTS: dict[str, Disturb] = {
    "kill -9 at a random moment": kill,
    "kill -9 inside a system call (strace)": kill_in_syscall,
    "a system call fails with ENOSPC or EIO (strace)": fail_syscall,
    "SIGTERM, SIGHUP or SIGUSR1, also during the start": ask_to_stop,
    "SIGSTOP and SIGCONT": stop_and_go_on,
    "second start on the same folder": start_twice,
    "reader of the output gone (broken pipe)": close_the_pipe,
}


def cut_tensors(run: Path, rng: random.Random) -> None:
    """The newest checkpoint's tensors end too early."""
    file = _newest_file(run)
    os.truncate(file, rng.randrange(file.stat().st_size))


def flip_bits(run: Path, rng: random.Random) -> None:
    """One byte of the newest checkpoint is another."""
    file = _newest_file(run)
    place = rng.randrange(file.stat().st_size)
    with file.open("r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ (1 << rng.randrange(8))]))


def cut_meta(run: Path, rng: random.Random) -> None:
    """The newest checkpoint's description ends too early."""
    meta = whole_checkpoints(run)[-1] / "meta.json"
    os.truncate(meta, rng.randrange(meta.stat().st_size - 2))


def lose_a_file(run: Path, rng: random.Random) -> None:
    """A file of the newest checkpoint is gone."""
    rng.choice(sorted(whole_checkpoints(run)[-1].iterdir())).unlink()


def cut_config(run: Path, rng: random.Random) -> None:
    """config.json ends too early."""
    os.truncate(run / "config.json", rng.randrange((run / "config.json").stat().st_size - 2))


def leave_rubbish(run: Path, rng: random.Random) -> None:
    """Half-written things of another kill lie about."""
    for name in ("step-00000099.partial", "best.old.partial"):
        folder = run / "checkpoints" / name
        folder.mkdir(exist_ok=True)
        (folder / "shard-00001-model-00001-of-00001.safetensors").write_bytes(rng.randbytes(100))
    (run / "config.json.partial").write_text("{")


FILE_FAULTS: dict[str, Callable[[Path, random.Random], None]] = {
    "newest checkpoint cut short": cut_tensors,
    "newest checkpoint with a flipped bit": flip_bits,
    "newest checkpoint's meta.json cut short": cut_meta,
    "newest checkpoint lost a file": lose_a_file,
    "config.json cut short": cut_config,
    "leftovers of other kills": leave_rubbish,
}


def _newest_file(run: Path) -> Path:
    return next(whole_checkpoints(run)[-1].glob("*.safetensors"))


def _traced(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
    return "TracerPid:\t0\n" not in status
