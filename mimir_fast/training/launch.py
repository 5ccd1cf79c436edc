"""Which launch a process belongs to: a requeued job and a restarted worker are the same one, going on.

MIMIR_FAST_LAUNCH_ID, when set, decides; the templates in launch/ set it where the scheduler has no such name.
"""

import os

_IDS = ("MIMIR_FAST_LAUNCH_ID", "SLURM_JOB_ID", "SKYPILOT_TASK_ID", "PBS_JOBID", "LSB_JOBID", "TORCHELASTIC_RUN_ID")


def launch_id() -> str | None:
    """A name that survives restarts and requeueing of this launch; None when nobody gave it one."""
    for variable in _IDS:
        value = os.environ.get(variable, "")
        if value and value != "none":  # torchrun's word for a run without --rdzv_id
            return f"{variable}={value}"
    return None


def restarts() -> int:
    """How often torchrun has restarted the workers of this launch."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
