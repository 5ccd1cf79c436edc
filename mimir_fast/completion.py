"""The commands by name, and the script by which a shell completes `mimir-fast`, them and their options; tyro writes it.

A shell completes programs, not `python -m mimir_fast.pretrain`: whichever command is asked, the script is that of
`mimir-fast`. The options of pre-training and fine-tuning are those of the default recipe's method.
"""

import contextlib
import io
from dataclasses import make_dataclass
from importlib import import_module
from typing import Annotated, Any, NamedTuple, Union

SHELLS = ("bash", "zsh")


class Command(NamedTuple):
    """A command: `main` of its module.

    Attributes:
        module: imported when the command is used.
        summary: a line of `mimir-fast --help`.
        options: what in the module (or in another, `module:name`) its command line is made from: a type, or a function
            from arguments to the defaults; empty for a command without options.
    """

    module: str
    summary: str
    options: str = ""


COMMANDS = {
    "pretrain": Command("mimir_fast.pretrain", "pre-train a masked autoencoder: MIMIR and its relatives",
                        "config_from"),
    "finetune": Command("mimir_fast.finetune", "fine-tune it into a robust classifier", "config_from"),
    "evaluate": Command("mimir_fast.evaluate", "attack any classifier and write a report", "EvaluateConfig"),
    "probe": Command("mimir_fast.probe", "nearest neighbours and linear probes of a frozen encoder", "ProbingConfig"),
    "predict": Command("mimir_fast.predict", "ask a classifier for single images, clean and attacked", "PredictConfig"),
    "compare": Command("mimir_fast.compare", "finished evaluations side by side", "CompareConfig"),
    "export": Command("mimir_fast.export", "take a model to timm, transformers, ONNX, torch.export, TorchScript",
                      "ExportConfig"),
    "hub": Command("mimir_fast.hub", "put a run on the Hugging Face Hub, or into a folder like one, with a model card",
                   "mimir_fast.publish:HubConfig"),
    "prepare": Command("mimir_fast.data.prepare", "write a data set as shards that are fast to read", "PrepareConfig"),
    "recipes": Command("mimir_fast.recipes.__main__", "list recipes, published numbers, what is implemented",
                       "RecipesConfig"),
    "reproduce": Command("mimir_fast.reproduce", "whole experiments: several runs, one table", "Experiment"),
    "info": Command("mimir_fast.info", "which backends run here, at which versions"),
}  # fmt: skip


def command_lines() -> dict[str, Any]:
    """Command → the type its command line is made from, or a value of that type with its defaults."""
    lines: dict[str, Any] = {}
    for name, command in COMMANDS.items():
        place, _, found = command.options.rpartition(":")
        options = getattr(import_module(place or command.module), found) if found else None
        if options is None:
            lines[name] = make_dataclass(name.title(), [])
        else:
            lines[name] = options([]) if command.options == "config_from" else options
    return lines


def script(shell: str) -> str:
    """The completion script for `bash` or `zsh`."""
    import tyro

    subcommands: list[Any] = []
    for name, line in command_lines().items():
        given = {} if isinstance(line, type) or name == "reproduce" else {"default": line}
        kind = type(line) if given else line
        description = COMMANDS[name].summary
        subcommands.append(Annotated[kind, tyro.conf.subcommand(name, description=description, **given)])
    written = io.StringIO()
    every: Any = Union[tuple(subcommands)]  # noqa: UP007
    with contextlib.redirect_stdout(written), contextlib.suppress(SystemExit):
        tyro.cli(every, prog="mimir-fast", args=["--tyro-print-completion", shell], use_underscores=True)
    return written.getvalue()
