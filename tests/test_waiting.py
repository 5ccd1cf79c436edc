"""When a command lets its threads sleep, and that it does so before torch is there."""

import os
import subprocess
import sys

import pytest
from commands import command_environment

from mimir_fast.waiting import spare_busy_cores

CODE = """
import os, sys
os.getloadavg = lambda: ({load}, 0.0, 0.0)
sys.argv = [{program!r}]
import mimir_fast
{then}
print(os.environ.get("OMP_WAIT_POLICY"))
"""
ASK = "from mimir_fast import command; sys.argv = ['mimir-fast', '--version']; command.main()"


@pytest.mark.parametrize(
    ("load", "program", "then", "policy"),
    [
        (99, "-m", "", "passive"),  # what Python says while `python -m mimir_fast.pretrain` imports the package
        (0.5, "-m", "", "None"),
        (99, "their_program.py", "", "None"),
        (99, "/usr/bin/mimir-fast", ASK, "passive"),
    ],
)
def test_a_command_on_a_busy_machine(load: float, program: str, then: str, policy: str) -> None:
    environment = {name: value for name, value in command_environment().items() if name != "OMP_WAIT_POLICY"}
    code = CODE.format(load=load, program=program, then=then)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert out.stdout.split()[-1] == policy


def test_what_is_said_or_too_late_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (99.0, 0.0, 0.0))
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert "torch" in sys.modules and not spare_busy_cores()
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")
    assert not spare_busy_cores() and "OMP_WAIT_POLICY" not in os.environ
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 99.0, 99.0))
    assert not spare_busy_cores()
