"""Commands as programs: their options from typed dataclasses, their errors as one line, their completion in a shell.

Recipe first, then preset, then flags, each overriding the one before. Floats may be typed as fractions
(`--attack.eps 8/255`).
"""

import inspect
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from torch.distributed.elastic.multiprocessing.errors import record

from mimir_fast._tyro import tyro
from mimir_fast.completion import SHELLS, script
from mimir_fast.config_file import with_config_files
from mimir_fast.short_help import short_help
from mimir_fast.validation import parse_float, refuse_idle
from mimir_fast.versions import COMPLETION_HINT, called_as
from mimir_fast.world import RunFailed, drop_unread, leave_at_once

T = TypeVar("T")
CONFIG_HINT = "--config FILE reads options from a .yaml, .toml or .json file, or a run's config.json; flags go first."


def run(main: Callable[[], None]) -> None:
    """Run a command as a program: errors that users can cause are one line, and `--print_completion SHELL` is known."""
    args = sys.argv[1:]
    if not any(arg.split("=")[0] == "--print_completion" for arg in args):
        exit_on_error(main)
        return
    shell = peek(args, "--print_completion")
    if shell not in SHELLS:
        print(f"error: --print_completion {shell or ''}: wanted {' or '.join(SHELLS)}", file=sys.stderr)
        raise SystemExit(2)
    print(script(shell))


def _float_rule(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[float] | None:
    if info.type is not float:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="FLOAT",
        instance_from_str=lambda args: parse_float(args[0]),
        is_instance=lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
        str_from_instance=lambda value: [f"{value:.6g}"],
    )


def parse(
    config_type: type[T], args: Sequence[str] | None = None, *, default: T | None = None, prog: str = "",
    common: Sequence[str] = (),
) -> T:  # fmt: skip
    """The config of a command line; a bad value ends the program with one clear line.

    Args:
        common: the options of the first screen of --help; --help_all shows every one.
    Raises:
        ValueError: an option was typed that does nothing as the others are (`idle`, see validation.py).
    """
    registry = tyro.constructors.ConstructorRegistry()
    registry.primitive_rule(_float_rule)
    keywords: dict[str, Any] = {} if default is None else {"default": default}
    words = list(sys.argv[1:] if args is None else args)
    if common and default is not None and {"-h", "--help"} & set(words):
        print(short_help(default, common, called_as(prog), _description(config_type)))
        raise SystemExit(0)
    words = ["--help" if word == "--help_all" else word for word in words]
    typed, words = words, with_config_files(words)
    config: T = tyro.cli(
        config_type,
        args=words,
        prog=called_as(prog) if prog else None,
        description=_description(config_type),
        registry=registry,
        use_underscores=True,
        **keywords,
    )
    refuse_idle(config, typed)  # what a file says was right where it comes from, and may wait
    return config


def _description(config_type: Any) -> str:
    """What --help says first: the docstring, files of options, and how a shell completes."""
    said = (inspect.getdoc(config_type) or "") if isinstance(config_type, type) else ""
    return f"{said}\n\n{CONFIG_HINT}\n\n{COMPLETION_HINT}".strip()


def peek(args: Sequence[str], flag: str) -> str | None:
    """The value of the last `--flag VALUE` or `--flag=VALUE` before the real parsing; None when it is not there.

    The last, as the parser takes it: templates put what a user adds after their own.
    """
    for index in reversed(range(len(args))):
        if args[index] == flag and index + 1 < len(args):
            return args[index + 1]
        if args[index].startswith(flag + "="):
            return args[index].split("=", 1)[1]
    return None


def exit_on_error(main: Callable[[], None]) -> None:
    """Run `main`; an expected error (bad value, missing file or package) is one line on stderr and exit code 2."""
    try:
        record(main)()  # torchrun shows the first failure of all ranks
    except (ValueError, ImportError, OSError, RunFailed) as error:
        if sys.flags.dev_mode:  # python -X dev: the whole traceback
            raise
        with suppress(OSError):
            print(f"error: {error}", file=sys.stderr)
        leave_at_once(2)
    except KeyboardInterrupt:
        with suppress(OSError):
            print("interrupted", file=sys.stderr)
        leave_at_once(128 + signal.SIGINT)
    except Exception:
        traceback.print_exc()
        leave_at_once(1)
    finally:
        drop_unread()
