"""Small runs to be disturbed, and the oracle: the same bits as the run that nobody disturbed."""

import json
import random
import socket
import time
import zlib
from pathlib import Path
from typing import Any

from chaos.zygote import Process, Zygote

STEPS = 18
# 64 digits in batches of 16: four steps an epoch, so steps, epochs and checkpoints do not coincide.
SMALL = [
    "--recipe", "digits/mimir_vit_nano", "--data.limit", "64", "--model.patch_size", "16", "--batch_size", "16",
    "--max_steps", str(STEPS), "--save_every", "2", "--log_every", "1", "--ema_decay", "0.9", "--precision", "fp32",
    "--device", "cpu",
]  # fmt: skip
PATIENCE = 300.0  # seconds for one start; a run that is silent for so long hangs


class Runs:
    """Starts and compares runs below a folder."""

    def __init__(self, folder: Path, zygote: Zygote) -> None:
        self.folder, self.zygote = folder, zygote
        self._references: dict[int, Path] = {}

    def start(self, run: Path, *extra: str, **options: Any) -> Process:
        """A single-process run."""
        args = [*SMALL, "--output_dir", str(run), *extra]
        return self.zygote.start("mimir_fast.pretrain", args, **options)

    def start_ranks(self, run: Path, *extra: str, hosts: list[dict[str, Any]] | None = None) -> list[Process]:
        """Two ranks, as torchrun would start them; `hosts` has each one's start options."""
        port = str(_free_port())
        processes = []
        for rank in range(2):
            options = dict(hosts[rank]) if hosts else {}
            group = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": port}
            options["env"] = {"MASTER_ADDR": "127.0.0.1", **group, **options.get("env", {})}
            processes.append(self.start(run, *extra, **options))
        return processes

    def reference(self, ranks: int = 1) -> Path:
        """The run nobody disturbs."""
        if ranks not in self._references:
            run = self.folder / f"reference-{ranks}"
            processes = [self.start(run)] if ranks == 1 else self.start_ranks(run)
            for process in processes:
                code = process.wait(PATIENCE)
                assert code == 0, process.said()
            self._references[ranks] = run
        return self._references[ranks]

    def check_same(self, run: Path, ranks: int = 1) -> None:
        """Every bit of the last checkpoint (weights, averages, optimiser) and every logged loss."""
        reference = self.reference(ranks)
        wanted, found = (final_tensors(r) for r in (reference, run))
        assert wanted, f"{reference}: there is nothing to compare with"
        other = [name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)]
        assert not other, f"{run}: {len(other)} tensors are not those of the undisturbed run, such as {other[:3]}"
        assert losses(run) == losses(reference), f"{run}: the losses are not those of the undisturbed run"
        leftovers = [p.name for p in (run / "checkpoints").iterdir() if p.name.endswith(".partial")]
        assert not leftovers, f"{run}: {leftovers} were left"


def final_tensors(run: Path) -> dict[str, tuple[Any, ...]]:
    """Shard and name → dtype, shape, checksum of every tensor (a file lists its keys in any order)."""
    found: dict[str, tuple[Any, ...]] = {}
    for file in (run / "checkpoints" / f"step-{STEPS:08d}").glob("*.safetensors"):
        content = file.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        for name, info in header.items():
            if name != "__metadata__":
                first, last = info["data_offsets"]
                data = zlib.crc32(content[start + first : start + last])
                found[f"{file.name}/{name}"] = (info["dtype"], info["shape"], data)
    return found


def losses(run: Path) -> list[tuple[int, float]]:
    """Step and loss of every logged step."""
    found = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        if "loss" in values:
            found.append((values["step"], values["loss"]))
    return found


def steps_logged(run: Path) -> int:
    """Whole lines of metrics.jsonl so far."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def whole_checkpoints(run: Path) -> list[Path]:
    """Step checkpoints, oldest first."""
    found = run / "checkpoints"
    return sorted(p for p in found.glob("step-*") if p.suffix == "" and p.is_dir()) if found.exists() else []


def wait_until_random_moment(process: Process, run: Path, rng: random.Random) -> None:
    """Somewhere in the start, or some steps later, or where it ends by itself."""
    if rng.random() < 0.3:
        time.sleep(rng.uniform(0, 2.0))
        return
    goal, deadline = steps_logged(run) + rng.randint(1, 5), time.monotonic() + PATIENCE
    while steps_logged(run) < min(goal, STEPS) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.15))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
