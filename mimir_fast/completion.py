"""The script by which a shell completes `mimir-fast`, its commands and their options; tyro writes it.

A shell completes programs, not `python -m mimir_fast.pretrain`: whichever command is asked, the script is that of
`mimir-fast`. The options of pre-training and fine-tuning are those of the default recipe's method.
"""

import contextlib
import io
from dataclasses import make_dataclass
from typing import Annotated, Any, Union

import tyro

from mimir_fast.command import COMMANDS


def command_lines() -> dict[str, Any]:
    """Command → the type its command line is made from, or a value of that type with its defaults."""
    from mimir_fast.compare import CompareConfig
    from mimir_fast.data.prepare import PrepareConfig
    from mimir_fast.evaluate import EvaluateConfig
    from mimir_fast.export import ExportConfig
    from mimir_fast.finetune import config_from as finetuning
    from mimir_fast.hub import HubConfig
    from mimir_fast.pretrain import config_from as pretraining
    from mimir_fast.recipes.__main__ import RecipesConfig
    from mimir_fast.reproduce import Experiment

    return {
        "pretrain": pretraining([]), "finetune": finetuning([]), "evaluate": EvaluateConfig, "compare": CompareConfig,
        "export": ExportConfig, "hub": HubConfig, "prepare": PrepareConfig, "recipes": RecipesConfig,
        "reproduce": Experiment, "info": make_dataclass("Info", []),
    }  # fmt: skip


def script(shell: str) -> str:
    """The completion script for `bash` or `zsh`."""
    subcommands: list[Any] = []
    for name, line in command_lines().items():
        given = {} if isinstance(line, type) or name == "reproduce" else {"default": line}
        kind = type(line) if given else line
        subcommands.append(Annotated[kind, tyro.conf.subcommand(name, description=COMMANDS[name][1], **given)])
    written = io.StringIO()
    every: Any = Union[tuple(subcommands)]  # noqa: UP007
    with contextlib.redirect_stdout(written), contextlib.suppress(SystemExit):
        tyro.cli(every, prog="mimir-fast", args=["--tyro-print-completion", shell], use_underscores=True)
    return written.getvalue()
