"""`command | head -1`: the exit status is the command's own."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from contextlib import suppress
from mimir_fast.world import drop_unread
print("nobody reads this")
with suppress(OSError):
    print("nor this", file=sys.stderr, flush=True)
{end}
"""


@pytest.mark.parametrize(("end", "status"), [("drop_unread()", 0), ("", 120)])
def test_a_closed_pipe_leaves_the_exit_status(end: str, status: int) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    line = [sys.executable, "-c", PROGRAM.format(end=end)]
    try:
        done = subprocess.run(line, stdout=writer, stderr=writer, env=environment)
    finally:
        os.close(writer)
    assert done.returncode == status
