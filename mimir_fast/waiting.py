"""Threads that do not spin where others want the cores.

Between two parallel loops the threads of OpenMP spin, up to milliseconds each time, in case the next loop comes at
once. On cores that others use too they spin away the time in which the thread that they wait for could run. With 15
runnable processes on 2 cores a pre-training step of digits/mimir_vit_nano took 15 s (plain PyTorch: 33 s) and 3.6 s of
CPU time; with threads that sleep while they wait 1.2 s and 0.27 s.

The OpenMP runtime reads its policy when it is loaded, which is when torch is imported. So a command sets it before, by
what the machine looks like then; a library that is imported into somebody's program leaves it alone.
"""

import os
import sys

_SAID = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def spare_busy_cores() -> bool:
    """Let the threads of this process sleep while they wait, if more processes than cores are running; whether it did.

    Not where torch is there already, or the user has said in the environment how threads wait.
    """
    if "torch" in sys.modules or any(name in os.environ for name in _SAID):
        return False
    try:
        load = os.getloadavg()[0]
    except OSError:  # the system does not say
        return False
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if load <= cores:
        return False
    os.environ["OMP_WAIT_POLICY"] = "passive"
    return True
