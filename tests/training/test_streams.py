"""`command | head -1`: the exit status is the command's own."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from contextlib import suppress
print("nobody reads this")
with suppress(OSError):
    print("nor this", file=sys.stderr, flush=True)
{end}
"""


OURS = "from mimir_fast.world import drop_unread; drop_unread()"


@pytest.mark.parametrize(("end", "status"), [(OURS, 0), ("", 120)], ids=["ours", "Python's"])
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
