"""A real Slurm of one node on loopback, with its own munge, in a folder of its own: apt-get install slurm-wlm munge."""

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={port2}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=1,sched_interval=5,bf_interval=5
KillWait=60
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=32 CoresPerSocket=32 Gres=gpu:16 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 State=UP
PartitionName=grace Nodes=ALL PriorityTier=1 GraceTime=120 State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP
"""


class Slurm:
    """Its daemons and how they are spoken to; `close` ends them.

    Args:
        folder: for configuration, state and logs; its path must be short enough for a socket.
        environment: of every job and command.
    """

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        if os.getuid() != 0 or not all(map(shutil.which, ("slurmctld", "slurmd", "munged"))):
            pytest.skip("needs root, and apt-get install slurm-wlm munge")
        self.folder = folder
        self.environment = environment | {"SLURM_CONF": str(folder / "slurm.conf")}
        for name in ("state", "spool"):
            (folder / name).mkdir()
        host, port = socket.gethostname(), 21000 + os.getpid() % 5000
        (folder / "slurm.conf").write_text(_CONF.format(host=host, folder=folder, port=port, port2=port + 5000))
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (folder / "gres.conf").write_text(f"NodeName={host} Name=gpu File={folder}/gpu[0-15]\n")
        for number in range(16):
            (folder / f"gpu{number}").touch()
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o600)
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self.say("munged", "--force", *(f"--{option}={folder}/munge.{end}" for option, end in files.items()))
        self.say("slurmctld", "-c")
        self.say("slurmd")
        self.until(lambda: "idle" in self.say("sinfo", "-h", "-o", "%T"))

    def say(self, *words: str, check: bool = True, variables: Mapping[str, str] | None = None) -> str:
        """What a command of Slurm's answers on both its streams."""
        done = subprocess.run(
            words, cwd=self.folder, env=self.environment | dict(variables or {}), text=True, timeout=120,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stdout
        return done.stdout.strip()

    def until(self, holds: Callable[[], object], seconds: float = 900) -> None:
        """Wait until something holds, fifteen minutes at most: four ranks on two busy cores start in two."""
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, self.say("squeue") + "\n" + self.logs()
            time.sleep(0.5)

    def field(self, job: str, name: str) -> str:
        """One field of `scontrol show job`, such as JobState or Restarts."""
        found = re.search(rf"\b{name}=(\S+)", self.say("scontrol", "show", "job", job))
        assert found is not None
        return found[1]

    def ends(self, job: str, state: str, restarts: int = 0) -> None:
        """Wait until the job has ended or is requeued: in that state, and so often."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")

        def ended() -> bool:
            found = self.field(job, "JobState")
            return found in over or (found == "PENDING" and self.field(job, "Restarts") != "0")

        self.until(ended)
        assert (self.field(job, "JobState"), self.field(job, "Restarts")) == (state, str(restarts)), self.log(job)

    def start_again(self, job: str) -> None:
        """Slurm leaves a requeued job in the queue for two minutes; not here."""
        # In the second in which it ended its credential is still revoked: "Killing non-startable batch job".
        time.sleep(2)
        self.say("scontrol", "update", f"JobId={job}", "StartTime=now")

    def log(self, job: str) -> str:
        """What the job has printed."""
        path = self.folder / f"{job}.log"
        return path.read_text() if path.exists() else ""

    def logs(self) -> str:
        """What all jobs have printed."""
        return "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in self.folder.glob("[0-9]*.log"))

    def close(self) -> None:
        """End all jobs, then the daemons."""
        self.say("scancel", "-u", "root", check=False)
        time.sleep(3)
        for name in ("slurmd", "slurmctld", "munge"):
            if (pid := self.folder / f"{name}.pid").exists():
                self.say("kill", pid.read_text().strip(), check=False)
