"""What a terminal shows after a program ran in it: a pty of a given width, and the control sequences that rich uses."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import traceback
from collections.abc import Callable

_TOKEN = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)")


def run_in_terminal(columns: int, work: Callable[[], object]) -> list[str]:
    """Run `work` in a fork of this process whose terminal is a pty, 200 rows high; what stands on the screen then.

    Raises:
        AssertionError: it failed; the message is the screen.
    """
    pid, terminal = pty.fork()
    if pid == 0:
        code = 1
        try:
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 200, columns, 0, 0))
            os.environ.update(TERM="xterm-256color")
            for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
                os.environ.pop(name, None)
            sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
            work()
            sys.stdout.flush()
            code = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)
    received = bytearray()
    while True:
        try:
            if not (part := os.read(terminal, 65536)):
                break
        except OSError:  # Linux says so when the other side has closed
            break
        received += part
    os.close(terminal)
    screen = shown(received.decode(), columns)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "\n".join(screen)
    return screen


def shown(text: str, columns: int) -> list[str]:
    """The lines on a screen of that width after `text` was written to it."""
    rows, row, column = [""], 0, 0
    for argument, command, control, plain in _TOKEN.findall(text):
        if control == "\r":
            column = 0
        elif control == "\n":
            row += 1
            rows += [""] * (row + 1 - len(rows))
        elif command == "A":
            row = max(0, row - int(argument or 1))
        elif command == "K":
            assert argument == "2"
            rows[row] = ""
        elif command:
            assert command in "mhl", f"unknown control sequence {argument}{command}"
        for letter in plain:
            if column == columns:
                row, column = row + 1, 0
                rows += [""] * (row + 1 - len(rows))
            rows[row] = rows[row][:column].ljust(column) + letter + rows[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in rows]
