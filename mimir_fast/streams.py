"""Output that nobody reads any more (`| head -1`) does not change how a command ends."""

import os
import sys


def drop_unread() -> None:
    """Flush stdout and stderr; where the reader is gone, what is printed from here on goes nowhere.

    Without this Python's own flush at the end fails, and the exit status of a good run is 120.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
