"""Worker processes: killed ones are started again, none needs /dev/shm, errors arrive, nothing stays behind."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
from itertools import islice

import numpy as np
import pytest
import torch

from mimir_fast.data import DataConfig, build_loader
from mimir_fast.data.loaders.processes import MAX_RESTARTS, WorkerKilledError, Workers
from mimir_fast.data.order import BatchPlan, KeyStream, SampleOrder
from mimir_fast.training.garbage import collected_by_hand


def fill(key, slot):
    """Each row is filled with its sample's number; sample 13 cannot be read."""
    samples, _ = key
    if 13 in samples:
        raise ValueError("sample 13 is bad")
    slot[: len(samples)] = samples[:, None].astype(np.uint8)
    return samples, os.getpid()


def keys(num=100, batch=3):
    return KeyStream(SampleOrder(num, shuffle=False), BatchPlan(batch, stop=num))


def test_batches_come_in_order_from_several_processes():
    workers = Workers(fill, (4, 5), 3)
    seen = [(slot[: len(samples)].copy(), samples, pid) for slot, (samples, pid) in workers.read(keys(12, 4))]
    assert [samples.tolist() for _, samples, _ in seen] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert all((slot == samples[:, None]).all() for slot, samples, _ in seen)
    assert len({pid for *_, pid in seen}) == 3 and os.getpid() not in {pid for *_, pid in seen}
    workers.close()


def test_an_error_in_a_worker_is_raised_here_with_its_place():
    workers = Workers(fill, (3, 5), 2)
    with pytest.raises(ValueError, match="sample 13 is bad") as caught:
        list(workers.read(keys()))
    assert any("in a loader process" in note for note in caught.value.__notes__)
    workers.close()


@pytest.mark.parametrize("how", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU, signal.SIGINT])
def test_warnings_to_the_whole_job_are_the_parents_affair(how):
    """A terminal that closes and a scheduler before its limit signal every process; the parent saves and ends them."""
    handler = signal.signal(how, lambda *_: os._exit(1))  # what workers inherit from a training process
    workers = Workers(fill, (3, 5), 1)
    try:
        pids = set()
        for _, (_, pid) in workers.read(keys(12, 3)):
            os.kill(pid, how)
            pids.add(pid)
        assert len(pids) == 1
    finally:
        workers.close()
        signal.signal(how, handler)


def test_a_worker_collects_its_garbage_while_its_parent_trains():
    """It is forked from a process whose collector may be off."""
    with collected_by_hand():
        assert not gc.isenabled()
        workers = Workers(lambda key, slot: gc.isenabled(), (3, 5), 1)
        assert all(collects for _, collects in workers.read(keys(6, 3)))
        workers.close()
    assert gc.isenabled() and gc.get_freeze_count() == 0


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_worker_is_started_again_and_nothing_is_lost(image_folder, how, caplog):
    def build():
        config = DataConfig(source="folder", root=str(image_folder), image_size=48, loader="torch", num_workers=2)
        return build_loader(config, split="train", batch_size=4, seed=1)

    loader = build()
    whole = list(islice(loader, 20))
    loader.close()
    loader, batches = build(), []
    for number, batch in enumerate(islice(loader, 20)):
        batches.append(batch)
        if number in (3, 9):
            os.kill(worker_pids()[number % 2], how)
    for first, second in zip(whole, batches, strict=True):
        assert torch.equal(first.images, second.images) and torch.equal(first.samples, second.samples)
    assert caplog.text.count(f"a loader process ended by signal {int(how)}; starting it again") == 2
    loader.close()


def worker_pids() -> list[int]:
    """Of this process's loaders."""
    return sorted(process.pid for process in multiprocessing.active_children() if process.name == "mimir_fast loader")


def test_a_worker_that_dies_again_and_again_ends_the_run_with_advice():
    def die(key, slot):
        os.kill(os.getpid(), signal.SIGKILL)

    workers = Workers(die, (3, 5), 1)
    with pytest.raises(WorkerKilledError, match=rf"by signal 9, {MAX_RESTARTS + 1} times.*out of memory.*num_workers"):
        next(workers.read(keys()))
    workers.close()


def test_a_pass_that_is_broken_off_leaves_nothing_to_the_next():
    workers = Workers(fill, (3, 5), 2)
    for _ in range(3):
        first = next(workers.read(keys(12, 3)))
        assert first[1][0].tolist() == [0, 1, 2]
    assert [samples.tolist() for _, (samples, _) in workers.read(keys(6, 3))] == [[0, 1, 2], [3, 4, 5]]
    workers.close()


def test_workers_end_when_their_parent_is_killed(image_folder):
    code = f"""
        import multiprocessing, os, signal
        from mimir_fast.data import DataConfig, build_loader
        config = DataConfig(source="folder", root={str(image_folder)!r}, image_size=48, loader="torch", num_workers=3)
        loader = build_loader(config, split="train", batch_size=2)
        next(iter(loader))
        print(*[process.pid for process in multiprocessing.active_children()], flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    process = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert process.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in process.stdout.split()]
    assert len(pids) == 3
    for pid in pids:  # each looks after its parent every few seconds
        wait_until_gone(pid)


def wait_until_gone(pid: int) -> None:
    import time

    for _ in range(600):
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return
        except OSError:
            return
        time.sleep(0.1)
    raise AssertionError(f"process {pid} is still there a minute after its parent")


def test_no_room_in_dev_shm_is_needed(image_folder):
    """In a mount namespace whose /dev/shm is full; batches here are far larger than what is free."""
    config = f"DataConfig(source='folder', root={str(image_folder)!r}, image_size=224, loader='torch', num_workers=2)"
    code = (
        "from itertools import islice; from mimir_fast.data import DataConfig, build_loader;"
        f"loader = build_loader({config}, split='train', batch_size=16);"
        "print(sum(len(batch.images) for batch in islice(loader, 6))); loader.close()"
    )
    mount = 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", mount, "sh", sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True)
    if "unshare" in result.stderr or "mount:" in result.stderr:
        pytest.skip(f"no mount namespaces here: {result.stderr.strip()}")
    assert result.stdout.strip() == "96", result.stderr


@pytest.mark.parametrize("threads", [1, 4])
def test_several_files_can_be_read_at_a_time(image_folder, threads):
    options = {"source": "folder", "root": str(image_folder), "image_size": 48, "loader": "torch"}
    (one,) = islice(build_loader(DataConfig(**options, num_workers=0), split="train", batch_size=16), 1)
    loader = build_loader(DataConfig(**options, num_workers=1, read_threads=threads), split="train", batch_size=16)
    (several,) = islice(loader, 1)
    assert torch.equal(one.images, several.images)
    loader.close()


def test_a_worker_does_not_load_the_compiler(image_folder):
    """torch._dynamo takes 2 s and 80 MB in each process; any call of one of our ops would import it."""
    script = f"""
        import sys
        from mimir_fast.data import DataConfig, build_loader
        config = DataConfig(source="folder", root={str(image_folder)!r}, loader="torch", num_workers=0, image_size=32)
        next(iter(build_loader(config, split="train", batch_size=8)))
        assert "torch._dynamo" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=120)
