"""Longer stories of misfortune: disks, data, ranks and hosts. Each returns how often it did what."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
from chaos.bad_input import bad_command_lines
from chaos.chains import chain
from chaos.faults import PROCESS_FAULTS
from chaos.folders import foreign_folders
from chaos.network import TwoHosts
from chaos.runs import DDP, PATIENCE, PRETRAIN, Job, Runs, losses, steps_logged
from zygote import Process, free_port

Story = Callable[[Runs, Path, random.Random], dict[str, int]]


@contextmanager
def tmpfs(folder: Path, size: str) -> Iterator[None]:
    """A new folder on a small file system of its own."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "chaos", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def full_disk(runs: Runs, run: Path, rng: random.Random) -> dict[str, int]:
    """A small file system that fills up: said, survived by the older checkpoint, gone on from when there is room."""
    with tmpfs(run, "80m"):
        process = runs.start(run / "run", "--stop_after", "4")
        assert process.wait(PATIENCE) == 0, process.said()
        ballast = run / "ballast"
        with ballast.open("wb") as file:
            try:
                while True:
                    file.write(bytes(2**20))
                    file.flush()
            except OSError:
                pass
        process = runs.start(run / "run")
        code = process.wait(PATIENCE)
        assert code == 2 and "No space left" in process.said(), process.said()
        assert "Traceback" not in process.said(), process.said()
        ballast.unlink()
        process = runs.start(run / "run")
        assert process.wait(PATIENCE) == 0, process.said()
        runs.check_same(run / "run")
    return {"disk full (tmpfs)": 1}


def disk_fills_while_training(runs: Runs, run: Path, rng: random.Random) -> dict[str, int]:
    """The same, but it fills in the middle of a run and has room again later: the run never ends."""
    with tmpfs(run, "100m"):
        process = runs.start(run / "run", "--keep_last", "2")
        _until(lambda: steps_logged(run / "run") >= 4, process)
        subprocess.run(["mount", "-o", "remount,size=36m", str(run)], check=True)
        _until(lambda: "WARNING: could not write checkpoint" in process.said() or not _alive(process), process)
        subprocess.run(["mount", "-o", "remount,size=120m", str(run)], check=True)
        assert process.wait(PATIENCE) == 0, process.said()
        runs.check_same(run / "run")
    return {"disk full for a while, in a running run": 1}


def read_only(runs: Runs, run: Path, rng: random.Random) -> dict[str, int]:
    """A folder that cannot be written: one line, and nothing trained in vain."""
    with tmpfs(run, "80m"):
        process = runs.start(run / "run", "--stop_after", "4")
        assert process.wait(PATIENCE) == 0, process.said()
        subprocess.run(["mount", "-o", "remount,ro", str(run)], check=True)
        process = runs.start(run / "run")
        code, said = process.wait(PATIENCE), process.said()
        assert code == 2 and "Read-only file system" in said and "Traceback" not in said, said
        subprocess.run(["mount", "-o", "remount,rw", str(run)], check=True)
        process = runs.start(run / "run")
        assert process.wait(PATIENCE) == 0, process.said()
        runs.check_same(run / "run")
    return {"read-only folder": 1}


def data_and_workers(runs: Runs, run: Path, rng: random.Random) -> dict[str, int]:
    """A killed loader process is replaced, four in a row end the start but not the run; vanished files are counted."""
    data = run.parent / "data"
    _make_images(data, rng)
    job = Job(
        f"images-{run.parent.name}", "mimir_fast.pretrain",
        (*PRETRAIN.args, "--data.source", "folder", "--data.root", str(data), "--data.loader", "torch",
         "--data.num_workers", "1"),
    )  # fmt: skip
    runs.reference(job)

    def kill_worker(process: Process) -> int:
        """How many there were."""
        killed = 0
        for worker in _children(process.pid):
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
                killed += 1
        return killed

    process = runs.start(run, job=job)
    _until(lambda: steps_logged(run) >= rng.randint(2, 4), process)
    os.kill(process.pid, signal.SIGSTOP)  # so that the step cannot end meanwhile
    killed = kill_worker(process)
    os.kill(process.pid, signal.SIGCONT)
    assert killed == 1 and process.wait(PATIENCE) == 0, process.said()
    assert "a loader process ended by signal 9; starting it again" in process.said(), process.said()
    runs.check_same(run, job)

    often = run.with_name("often")
    process = runs.start(often, job=job)
    while process.poll() is None:
        killed += kill_worker(process)
        time.sleep(0.002)
    assert process.wait(1) == 2 and "a loader process ended by signal 9, 4 times" in process.said(), process.said()
    runs.finish(often, job=job)
    runs.check_same(often, job)

    small = run.with_name("shm")
    process = runs.start(small, job=job, setup="mount -t tmpfs -o size=1m chaos /dev/shm")
    assert process.wait(PATIENCE) == 0, process.said()
    runs.check_same(small, job)

    vanished = run.with_name("vanished")
    process = runs.start(vanished, job=job)
    _until(lambda: steps_logged(vanished) >= 2, process)
    next((data / "train").rglob("*.png")).unlink()
    assert process.wait(PATIENCE) == 0, process.said()
    assert "1 unreadable files were passed over" in process.said(), process.said()
    return {"data worker killed": killed, "data file vanished": 1, "/dev/shm of 1 MB": 1}


def ranks_die(runs: Runs, run: Path, rng: random.Random) -> dict[str, int]:
    """One of two ranks is killed, then one is stopped; the other leaves soon and says who it waited for."""
    runs.reference(DDP)
    processes = runs.start_ranks(run)
    _until(lambda: steps_logged(run) >= rng.randint(2, 4), processes[0])
    victim = rng.randrange(2)
    processes[victim].kill()
    started = time.monotonic()
    assert processes[1 - victim].wait(120) != 0
    assert time.monotonic() - started < 100, "the survivor waited too long"
    processes = runs.start_ranks(run, "--hang_minutes", "0.4")
    _until(lambda: steps_logged(run) >= 7, processes[0])
    processes[1].signal(signal.SIGSTOP)
    assert processes[0].wait(PATIENCE) == 75, processes[0].said()
    assert "rank 1 gives no sign" in processes[0].said(), processes[0].said()
    assert list((run / "hangs").rglob("rank-0.txt")) and list((run / "hangs").rglob("rank-0.collectives.json"))
    processes[1].kill()
    processes = runs.start_ranks(run)
    for process in processes:
        assert process.wait(PATIENCE) == 0, process.said()
    runs.check_same(run, DDP)
    return {"one of two ranks killed": 1, "one of two ranks stopped (SIGSTOP)": 1}


def one_two_one(runs: Runs, run: Path, rng: random.Random) -> dict[str, int]:
    """1 rank, then 2, then 1: the same curve up to the order of sums, and what changes is said."""
    process = runs.start(run, "--stop_after", "6")
    assert process.wait(PATIENCE) == 0, process.said()
    processes = runs.start_ranks(run, "--stop_after", "6")
    assert [p.wait(PATIENCE) for p in processes] == [0, 0], processes[0].said()
    assert "2 ranks now, 1 before" in processes[0].said()
    process = runs.start(run)
    assert process.wait(PATIENCE) == 0, process.said()
    assert "each accumulates 2 micro-batches" in process.said(), process.said()
    wanted, found = losses(runs.reference(PRETRAIN)), losses(run)
    assert [s for s, _ in found] == [s for s, _ in wanted]
    assert np.allclose([v for _, v in found], [v for _, v in wanted], rtol=2e-3), (wanted, found)
    return {"ranks 1 -> 2 -> 1": 2}


def two_hosts(runs: Runs, run: Path, rng: random.Random) -> dict[str, int]:
    """Two hosts with file systems of their own and a shared run folder: a bad wire, a host killed and replaced."""
    runs.reference(DDP)
    private = f"mount -t tmpfs chaos /var/tmp && mkdir -p {run}"
    with TwoHosts(rng.randrange(2**31)) as hosts:

        def start(*extra: str, setup: tuple[str, str] = (private, private)) -> list[Process]:
            sides = [{"netns": hosts.names[s], "setup": setup[s], "env": hosts.environment(s)} for s in range(2)]
            return runs.start_ranks(run, *extra, hosts=sides)

        hosts.delay, hosts.loss = 0.01, 0.02
        processes = start("--stop_after", "6")
        assert [p.wait(PATIENCE) for p in processes] == [0, 0], processes[0].said() + processes[1].said()
        hosts.delay, hosts.loss = 0.0, 0.0
        processes = start("--hang_minutes", "0.4")
        _until(lambda: steps_logged(run) >= 8, processes[0])
        hosts.up = False  # the cable is pulled: no reset, no answer
        codes = [p.wait(PATIENCE) for p in processes]
        assert all(codes), codes
        assert any("no step for" in p.said() for p in processes), processes[0].said()
        hosts.up = True
        processes = start()
        _until(lambda: steps_logged(run) >= 11, processes[0])
        processes[1].kill()  # a host is gone, and another takes its place
        assert processes[0].wait(PATIENCE) != 0
        processes = start()
        assert [p.wait(PATIENCE) for p in processes] == [0, 0], processes[0].said() + processes[1].said()
        runs.check_same(run, DDP)
        apart = run.with_name(run.name + "-apart")
        own = f"mkdir -p {apart} && mount -t tmpfs chaos {apart}"
        sides = [{"netns": hosts.names[s], "setup": own, "env": hosts.environment(s)} for s in range(2)]
        processes = runs.start_ranks(apart / "run", hosts=sides)
        codes = [p.wait(PATIENCE) for p in processes]
        assert codes == [2, 2] and "storage that all hosts share" in processes[1].said(), processes[1].said()
    return {
        "two hosts: 10 ms delay and 2 % loss": 1, "two hosts: link down": 1, "two hosts: one killed and replaced": 1,
        "two hosts without a shared folder": 1,
    }  # fmt: skip


def without_peers(runs: Runs, run: Path, rng: random.Random) -> dict[str, int]:
    """One process of two alone: it obeys a signal while it waits for the other, and has touched nothing."""
    times = 6
    for _ in range(times):
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "RANK": "0"}
        process = runs.start(run, env=group)
        time.sleep(rng.uniform(0.5, 4))
        number = rng.choice((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))
        assert process.signal(number), process.said()
        code = process.wait(PATIENCE / 20)
        assert code in (-number, 130) and not run.exists(), f"{code}: {process.said()}"
    return {"a signal while waiting for the other ranks": times}


SCENARIOS: dict[str, Story] = {
    "full_disk": full_disk,
    "disk_fills_while_training": disk_fills_while_training,
    "read_only": read_only,
    "data_and_workers": data_and_workers,
    "ranks_die": ranks_die,
    "one_two_one": one_two_one,
    "two_hosts": two_hosts,
    "without_peers": without_peers,
    "foreign_folders": foreign_folders,
    "bad_command_lines": bad_command_lines,
    "system_calls": partial(chain, PRETRAIN, kinds=tuple(name for name in PROCESS_FAULTS if "strace" in name)),
}


def _until(condition: Callable[[], bool], process: Process) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, f"ended early:\n{process.said()}"
        assert time.monotonic() < deadline, f"nothing happened:\n{process.said()}"
        time.sleep(0.02)


def _alive(process: Process) -> bool:
    return process.poll() is None


def _children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(word) for word in found.split()]


def _make_images(folder: Path, rng: random.Random) -> None:
    """64 PNG files in two classes, training and test."""
    from PIL import Image

    noise = np.random.default_rng(rng.randrange(2**31))
    for split in ("train", "val"):
        for number in range(64):
            path = folder / split / f"class{number % 2}" / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
