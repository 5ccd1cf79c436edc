"""What is done to a running process, and what is done to its files while it is down."""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from chaos.runs import PATIENCE, Job, Runs, step_checkpoints, wait_until_random_moment
from zygote import Process

from mimir_fast.checkpoints.reading import CheckpointError, verify

# At the entry of one of these the process is killed: within renaming, syncing, writing, listing, deleting, talking.
# With each, about how many a start of some steps makes: a fault in a later one would never come.
RENAME = "rename,renameat,renameat2"
SYSCALLS = {
    RENAME: 4, "fsync": 8, "unlink,unlinkat,rmdir": 4, "mkdir": 3, "write": 150, "openat": 300, "close": 300,
}  # fmt: skip

Disturb = Callable[[Runs, Path, Job, random.Random], tuple[Process, bool]]
"""Starts the run and disturbs it: the process, which has ended, and whether the fault came before that."""


def kill(runs: Runs, run: Path, job: Job, rng: random.Random) -> tuple[Process, bool]:
    """kill -9 at a random moment."""
    process = runs.start(run, job=job)
    wait_until_random_moment(process, run, rng)
    process.kill()
    code = process.wait(PATIENCE)
    assert code in (-signal.SIGKILL, 0), process.said()
    return process, code != 0


def kill_in_syscall(runs: Runs, run: Path, job: Job, rng: random.Random) -> tuple[Process, bool]:
    """kill -9 inside a random system call, by strace."""
    names, most = rng.choice(list(SYSCALLS.items()))
    when = rng.randint(1, most)
    code, process, _ = _inject(runs, run, job, rng, names, f"signal=KILL:when={when}")
    assert code in (-signal.SIGKILL, 0), process.said()
    return process, code != 0


def fail_syscall(runs: Runs, run: Path, job: Job, rng: random.Random) -> tuple[Process, bool]:
    """A system call says that the disk is full or broken: survived by another try, or one line and exit code 2."""
    names = rng.choice(("fsync", RENAME, "mkdir", "unlink,unlinkat,rmdir"))
    error, when = rng.choice(("ENOSPC", "EIO")), rng.randint(1, SYSCALLS[names])
    often = rng.choice(("", "+1")) if names == "fsync" else ""  # from then on all of them
    code, process, happened = _inject(runs, run, job, rng, names, f"error={error}:when={when}{often}")
    said = process.said()
    assert code == 0 or (code == 2 and "error: " in said), f"{names} {error} {when}{often}: {code}: {said}"
    return process, happened


def _inject(
    runs: Runs, run: Path, job: Job, rng: random.Random, names: str, what: str, path: Path | None = None
) -> tuple[int, Process, bool]:
    """Exit code of a run that strace plays with, and whether it did."""
    code, process, trace = play_with(runs.start(run, *_part(rng), job=job, paused=True), names, what, path)
    return code, process, "(INJECTED)" in trace


def play_with(process: Process, names: str, what: str, path: Path | None = None) -> tuple[int, Process, str]:
    """Let strace change what system calls do to a process that has stopped itself, or is about to.

    Args:
        names: of the system calls.
        what: is done to them, as strace's -e inject has it.
        path: only to those on this file.
    Returns:
        The exit code, the process, and what strace wrote.
    """
    trace = process.stdout.with_suffix(".strace")
    while _status(process.pid, "State") not in ("T", "Z", ""):  # SIGCONT before it has stopped would be lost
        time.sleep(0.01)
    only = ["-P", str(path)] if path else []
    tracer = subprocess.Popen(
        ["strace", "-f", "-qq", "-o", str(trace), *only, "-e", f"trace={names}", "-e", f"inject={names}:{what}", "-p",
         str(process.pid)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while _status(process.pid, "TracerPid") == "0" and tracer.poll() is None:
        time.sleep(0.01)
    process.signal(signal.SIGCONT)
    code = process.wait(PATIENCE)
    tracer.wait(30)
    return code, process, trace.read_text(errors="replace")


def ask_to_stop(runs: Runs, run: Path, job: Job, rng: random.Random) -> tuple[Process, bool]:
    """SIGTERM, SIGHUP or SIGUSR1, also during the start: saved, exit code 0."""
    return _ask(runs, run, job, rng, (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1))


def warn_of_a_limit(runs: Runs, run: Path, job: Job, rng: random.Random) -> tuple[Process, bool]:
    """SIGUSR2 (LSF, submitit) or SIGXCPU (a limit of processor time): the same."""
    return _ask(runs, run, job, rng, (signal.SIGUSR2, signal.SIGXCPU))


def _ask(
    runs: Runs, run: Path, job: Job, rng: random.Random, numbers: tuple[signal.Signals, ...]
) -> tuple[Process, bool]:  # fmt: skip
    process = runs.start(run, job=job)
    wait_until_random_moment(process, run, rng)
    number = rng.choice(numbers)
    happened = process.signal(number)
    code = process.wait(PATIENCE)
    # The first milliseconds after the fork are Python's own: no handler can be there yet.
    assert code == 0 or (code == -number and not process.said()), f"{code}: {process.said()}"
    return process, happened


def read_fails_once(runs: Runs, run: Path, job: Job, rng: random.Random) -> tuple[Process, bool]:
    """A file of the newest checkpoint has a stale handle when it is opened first, as on NFS: it is asked for again."""
    found = step_checkpoints(run)
    if not found:
        return kill(runs, run, job, rng)[0], False
    file, whole = rng.choice(sorted(found[-1].iterdir())), _is_whole(found[-1])
    aside = found[-1].with_name(f"{found[-1].name}.damaged")
    before = aside.exists()  # an earlier one of this step, which was written again
    code, process, happened = _inject(runs, run, job, rng, "openat", "error=ESTALE:when=1", path=file)
    assert code == 0, process.said()
    assert before or not (whole and aside.exists()), process.said()
    return process, happened


def refuse_links(runs: Runs, run: Path, job: Job, rng: random.Random) -> tuple[Process, bool]:
    """The storage has no symbolic links (EPERM, as buckets and some FUSE mounts say it): `best` is a text file."""
    code, process, happened = _inject(runs, run, job, rng, "symlink,symlinkat", "error=EPERM")
    assert code == 0, process.said()
    return process, happened


def requeue(runs: Runs, run: Path, job: Job, rng: random.Random) -> tuple[Process, bool]:
    """Slurm starts the killed job again, whose command line says --overwrite: it goes on, and deletes nothing."""
    launch = {"SLURM_JOB_ID": str(rng.randrange(10**6)), "SLURM_RESTART_COUNT": "0"}
    process = runs.start(run, *_part(rng), job=job, env=launch)
    wait_until_random_moment(process, run, rng)
    process.kill()
    process.wait(PATIENCE)
    began = _launch(run) == f"SLURM_JOB_ID={launch['SLURM_JOB_ID']}"
    before = {path.name for path in step_checkpoints(run)}
    if not began:  # killed before it had taken the folder: to overwrite would mean it
        return process, False
    again = runs.start(run, "--overwrite", *_part(rng), job=job, env=launch | {"SLURM_RESTART_COUNT": "1"})
    assert again.wait(PATIENCE) == 0, again.said()
    assert f"was made by this launch (SLURM_JOB_ID={launch['SLURM_JOB_ID']}); going on with it" in again.said()
    assert not before or "resumed at step" in again.said(), again.said()
    return again, True


def _launch(run: Path) -> str | None:
    try:
        found: str | None = json.loads((run / "environment.json").read_text()).get("launch")
    except (OSError, ValueError):
        return None
    return found


def stop_and_go_on(runs: Runs, run: Path, job: Job, rng: random.Random) -> tuple[Process, bool]:
    """SIGSTOP for half a second, as Ctrl-Z and fg."""
    process = runs.start(run, *_part(rng), job=job)
    wait_until_random_moment(process, run, rng)
    happened = process.signal(signal.SIGSTOP)
    time.sleep(0.5)
    process.signal(signal.SIGCONT)
    assert process.wait(PATIENCE) == 0, process.said()
    return process, happened


def start_twice(runs: Runs, run: Path, job: Job, rng: random.Random) -> tuple[Process, bool]:
    """A second start while the first one runs: refused with its name, the first is not disturbed."""
    first = runs.start(run, *_part(rng), job=job)
    deadline = time.monotonic() + PATIENCE
    while _holder(run) != first.pid and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    second = runs.start(run, job=job)
    code = second.wait(PATIENCE)
    held = code == 2 and f"is in use by process {first.pid}" in second.said()
    assert held or first.poll() is not None, second.said()
    assert first.wait(PATIENCE) == 0, first.said()
    return first, held


def _holder(run: Path) -> int | None:
    """Who took the lock last."""
    try:
        return int(json.loads((run / ".lock").read_text())["pid"])
    except (OSError, ValueError):
        return None


def close_the_pipe(runs: Runs, run: Path, job: Job, rng: random.Random) -> tuple[Process, bool]:
    """`| head -1`: nobody reads the output any more."""
    reader, writer = os.pipe()
    link = Path(f"/proc/{os.getpid()}/fd/{writer}")
    process = runs.start(run, *_part(rng), job=job, output=link)
    os.read(reader, 1)  # by now the process has opened its end
    os.close(writer)
    os.close(reader)
    assert process.wait(PATIENCE) == 0, "a closed pipe ended the run"
    return process, True


def _part(rng: random.Random) -> list[str]:
    """So that a start which survives its fault leaves some steps for the next one."""
    return ["--stop_after", str(rng.randint(1, 4))]


PROCESS_FAULTS: dict[str, Disturb] = {
    "kill -9 at a random moment": kill,
    "kill -9 inside a system call (strace)": kill_in_syscall,
    "a system call fails with ENOSPC or EIO (strace)": fail_syscall,
    "SIGTERM, SIGHUP or SIGUSR1, also during the start": ask_to_stop,
    "SIGUSR2 or SIGXCPU, also during the start": warn_of_a_limit,
    "SIGSTOP and SIGCONT": stop_and_go_on,
    "a stale handle (ESTALE), once, of the newest checkpoint (strace)": read_fails_once,
    "no symbolic links (EPERM, strace)": refuse_links,
    "requeued by Slurm with --overwrite": requeue,
    "second start on the same folder": start_twice,
    "reader of the output gone (broken pipe)": close_the_pipe,
}


def cut_tensors(checkpoint: Path, rng: random.Random) -> None:
    """The tensors end too early."""
    file = next(checkpoint.glob("*.safetensors"))
    os.truncate(file, rng.randrange(file.stat().st_size))


def flip_bits(checkpoint: Path, rng: random.Random) -> None:
    """One byte of the tensors is another."""
    _flip(next(checkpoint.glob("*.safetensors")), rng)


def flip_meta(checkpoint: Path, rng: random.Random) -> None:
    """One bit of the description is another."""
    _flip(checkpoint / "meta.json", rng)


def _flip(file: Path, rng: random.Random) -> None:
    place = rng.randrange(file.stat().st_size)
    with file.open("r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ (1 << rng.randrange(8))]))


def cut_meta(checkpoint: Path, rng: random.Random) -> None:
    """The description ends too early."""
    meta = checkpoint / "meta.json"
    os.truncate(meta, rng.randrange(meta.stat().st_size - 2))


def lose_a_file(checkpoint: Path, rng: random.Random) -> None:
    """A file is gone."""
    rng.choice(sorted(checkpoint.iterdir())).unlink()


def cut_config(run: Path, rng: random.Random) -> None:
    """config.json ends too early."""
    os.truncate(run / "config.json", rng.randrange(max(1, (run / "config.json").stat().st_size - 2)))


def spoil_metrics(run: Path, rng: random.Random) -> None:
    """Bytes that are no text behind the lines of metrics.jsonl, as a file system leaves them after a power cut."""
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\xfe\x00" + rng.randbytes(9).replace(b"\n", b"") + b"\n")


def leave_rubbish(run: Path, rng: random.Random) -> None:
    """Half-written things of another kill lie about."""
    for name in ("step-00000099.partial", "best.old.partial"):
        folder = run / "checkpoints" / name
        folder.mkdir(exist_ok=True)
        (folder / "shard-00001-model-00001-of-00001.safetensors").write_bytes(rng.randbytes(100))
    (run / "config.json.partial").write_text("{")


CHECKPOINT_FAULTS: dict[str, Callable[[Path, random.Random], None]] = {
    "newest checkpoint cut short": cut_tensors,
    "newest checkpoint with a flipped bit": flip_bits,
    "newest checkpoint's meta.json cut short": cut_meta,
    "newest checkpoint's meta.json with a flipped bit": flip_meta,
    "newest checkpoint lost a file": lose_a_file,
}
FOLDER_FAULTS: dict[str, Callable[[Path, random.Random], None]] = {
    "config.json cut short": cut_config,
    "leftovers of other kills": leave_rubbish,
    "metrics.jsonl with invalid bytes": spoil_metrics,
}


def damage(run: Path, rng: random.Random) -> list[str]:
    """What was done to the files of a run that is down: to its folder, and to all but one of its checkpoints at most.

    With no whole checkpoint left the run rightly refuses to go on; a test of its own has that.
    """
    if not (run / "config.json").exists() or not (run / "checkpoints").exists():
        return []
    done = [name for name in FOLDER_FAULTS if rng.random() < 0.3]
    for name in done:
        FOLDER_FAULTS[name](run, rng)
    found = step_checkpoints(run)[::-1]
    for checkpoint in found[: rng.randint(0, max(0, len(found) - 1))]:
        if not _is_whole(checkpoint):  # damaged before, and the start after that was killed too soon to see it
            continue
        done.append(rng.choice(list(CHECKPOINT_FAULTS)))
        CHECKPOINT_FAULTS[done[-1]](checkpoint, rng)
    return done


def _is_whole(checkpoint: Path) -> bool:
    try:
        verify(checkpoint)
    except CheckpointError:
        return False
    return True


def _status(pid: int, name: str) -> str:
    """A word of /proc/PID/status, empty when the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return ""
    return next(line.split()[1] for line in lines if line.startswith(f"{name}:"))
