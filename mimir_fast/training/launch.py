"""Which launch a start belongs to, and whether it replaces an earlier start of the same launch.

A job that is requeued and a worker that torchrun restarts are the same launch, going on: `--overwrite` and
`--no_resume` on its command line, which is the old one, must not delete what it did before. A person who types the
command again means it, in the same interactive job too. So a start goes on with a folder when the launch that is
recorded there is its own, and was not at its end unless a scheduler or torchrun repeats it: then nobody typed anything.
"""

import os
import socket

_IDS = ("MIMIR_FAST_LAUNCH_ID", "SLURM_JOB_ID", "SKYPILOT_TASK_ID", "PBS_JOBID", "LSB_JOBID")

FINISHED, INTERRUPTED = "finished", "interrupted"
"""How a start ends after which the same launch has nothing to go on with: all steps done, or Ctrl-C."""


def launch_id() -> str | None:
    """A name that survives requeueing: of the scheduler, or MIMIR_FAST_LAUNCH_ID, which the templates in launch/ set
    where a scheduler has none; None when nobody gave one."""
    return next((f"{variable}={os.environ[variable]}" for variable in _IDS if os.environ.get(variable)), None)


def agent() -> str | None:
    """torchrun's process that started this one and would restart it, as `host:pid`; None without torchrun."""
    return f"{socket.gethostname()}:{os.getppid()}" if "TORCHELASTIC_RUN_ID" in os.environ else None


def restarts() -> int:
    """How often torchrun has restarted the workers of this launch."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def repeated() -> bool:
    """True when Slurm or torchrun does an earlier start of this launch again, so that nobody typed the command."""
    return restarts() > 0 or int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0


def goes_on(recorded: dict[str, object], agents: list[str]) -> bool:
    """True when the start that `recorded` describes (a run's environment.json) is to be gone on with by this one.

    Args:
        agents: those of all ranks.
    """
    if recorded.get("ended") in (FINISHED, INTERRUPTED) and not repeated():
        return False
    if launch_id() is not None:
        return recorded.get("launch") == launch_id()
    before = recorded.get("agents")
    return restarts() > 0 and isinstance(before, list) and not set(agents).isdisjoint(before)
