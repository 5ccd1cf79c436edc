"""tyro, which parses every command line, or one line that says how to install what the commands need.

`import mimir_fast` and the ops need torch alone, and so somebody meets this who types a command next.
"""

import sys

try:
    import tyro as tyro
except ImportError as error:
    MISSING = (
        f"commands need {error.name}, and what else `pip install '.[train]'` in a checkout of mimir_fast installs; "
        "the ops alone need only torch"
    )
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None or spec.name.partition(".")[0] != "mimir_fast":  # imported by somebody's program
        raise ModuleNotFoundError(MISSING, name=error.name) from error
    print(f"error: {MISSING}", file=sys.stderr)
    raise SystemExit(2) from None
