"""What each command of the documentation is checked by: the parser that would really read it."""

import argparse
import re
import tomllib
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from doc_blocks import ROOT

Words = Sequence[str]

# What makes a command of ours small enough for CI: the last of two equal flags counts.
_NANO = ["--model.encoder", "nano", "--model.patch_size", "8", "--max_steps", "2", "--batch_size", "16"]
SMALL = {
    "mimir_fast.pretrain": _NANO,
    "mimir_fast.finetune": [*_NANO, "--attack.num_steps", "1", "--probe.num_images", "16", "--probe.num_steps", "1"],
    "mimir_fast.evaluate": ["--limit", "8", "--suite", "table", "--autoattack", "no"],
}


class NotAccepted(AssertionError):
    """A command that its parser refuses."""


def parse_module(module: str, args: Words) -> None:
    """Let a module's own parser read its arguments.

    Raises:
        NotAccepted: it refuses them, or this is no module of ours.
    """
    if module not in _PARSERS:
        raise NotAccepted(f"no parser for python -m {module} is known; add it to tests/doc_commands.py")
    if not args:
        return  # a mention of the command; what it requires is not said
    try:
        _PARSERS[module](list(args))
    except SystemExit as stop:
        if stop.code not in (0, None):
            raise NotAccepted(f"python -m {module} {' '.join(args)} is refused") from stop
    except ValueError as error:
        raise NotAccepted(f"python -m {module} {' '.join(args)}: {error}") from error


def _config_from(name: str) -> Callable[[Words], Any]:
    return lambda args: import_module(name).config_from(args)


def _dataclass(module: str, name: str) -> Callable[[Words], Any]:
    from mimir_fast.cli import parse

    return lambda args: parse(getattr(import_module(module), name), args)


def _main(name: str) -> Callable[[Words], Any]:
    return lambda args: import_module(name).main(args)


def _without_arguments(args: Words) -> None:
    if args:
        raise ValueError("takes no arguments")


PENALTY_WEIGHT = "mimir_fast.reproduction.penalty_weight"
SAME_DELTA = "mimir_fast.reproduction.same_delta"
_PARSERS: dict[str, Callable[[Words], Any]] = {
    **{f"mimir_fast.{name}": _config_from(f"mimir_fast.{name}")
       for name in ("pretrain", "finetune", "evaluate", "probe", "compare", "reproduce")},
    "mimir_fast.predict": _dataclass("mimir_fast.predict", "PredictConfig"),
    "mimir_fast.hub": _dataclass("mimir_fast.publish", "HubConfig"),
    "mimir_fast.export": _dataclass("mimir_fast.export", "ExportConfig"),
    "mimir_fast.data.prepare": _dataclass("mimir_fast.data.prepare", "PrepareConfig"),
    "mimir_fast.recipes": _main("mimir_fast.recipes.__main__"),
    "mimir_fast.recipes.__main__": _main("mimir_fast.recipes.__main__"),
    "mimir_fast.info": _without_arguments,
    PENALTY_WEIGHT: lambda args: import_module(PENALTY_WEIGHT).parse(args),
    SAME_DELTA: lambda args: import_module(SAME_DELTA).parse(args),
    "benchmarks": lambda args: import_module("benchmarks.cli").parse(args),
    "benchmarks.plan": lambda args: import_module("benchmarks.plan").parse(args),
    "mimir_kernels.aot": lambda args: argparse.ArgumentParser().parse_args([a for a in args if a != "--update"]),
}  # fmt: skip


def module_of(words: Words) -> tuple[str, list[str]] | None:
    """(module, its arguments) of a `python -m` or `torchrun … -m` command; None for others.

    Raises:
        NotAccepted: torchrun's parser refuses its own options.
    """
    if words[0].endswith("torchrun"):
        from torch.distributed.run import get_args_parser

        try:
            parsed = get_args_parser().parse_args(list(words[1:]))
        except SystemExit as stop:
            raise NotAccepted(f"torchrun refuses {' '.join(words)}") from stop
        assert parsed.module, f"wanted torchrun … -m MODULE: {' '.join(words)}"
        return parsed.training_script, parsed.training_script_args
    if words[0] == "mimir-fast" and not words[1].startswith("-"):
        from mimir_fast.completion import COMMANDS

        if words[1] not in COMMANDS:
            raise NotAccepted(f"mimir-fast has no command {words[1]}")
        return COMMANDS[words[1]].module, list(words[2:])
    if re.fullmatch(r"(.*/)?python3?", words[0]) and "-m" in words:
        index = words.index("-m")
        return words[index + 1], list(words[index + 2 :])
    return None


def make_command(target: str) -> list[str]:
    """The command of ours that a make target runs last.

    Raises:
        NotAccepted: there is no such target.
    """
    lines = (ROOT / "Makefile").read_text().splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith(f"{target}:")), None)
    if start is None:
        raise NotAccepted(f"the Makefile has no target {target}")
    body = []
    for line in lines[start + 1 :]:
        if not line.startswith("\t"):
            break
        body.append(line.strip())
    return body[-1].replace("$(BIN)/", "").replace("$(ARGS)", "").split() if body else []


def check(words: Words) -> None:
    """Nothing, when the command is one that works.

    Raises:
        NotAccepted: it is refused, or not known here.
    """
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    program = words[0]
    if found := module_of(words):
        parse_module(*found)
    elif program == "make":
        for target in (word for word in words[1:] if "=" not in word):
            make_command(target)
    elif program in ("pip", "python") and "install" in words:
        _check_extras(words)
    elif program in ("sbatch", "kubectl", "sky"):
        _check_launch(words)
    elif program == "mimir-fast":
        from mimir_fast.completion import SHELLS

        if words[1] not in ("--help", "--version") and list(words[1:2]) + list(words[2:3]) not in [
            ["--print_completion", shell] for shell in SHELLS
        ]:
            raise NotAccepted(f"mimir-fast does not know {' '.join(words[1:])}")
    elif program in ("source", "cd", "mkdir", "git", "apt-get", "export", "tensorboard", "docker"):
        pass  # other people's programs, whose options a reader knows better than we do
    else:
        raise NotAccepted(f"say how {' '.join(words)} is checked: tests/doc_commands.py")


def _check_extras(words: Words) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words:
        if match := re.search(r"(?:mimir-fast|\.)\[([^]]+)\]", word):
            missing = set(match[1].split(",")) - set(extras)
            if missing:
                raise NotAccepted(f"pyproject.toml has no extra {', '.join(missing)}: {' '.join(words)}")


def _check_launch(words: Words) -> None:
    template = next(word for word in words if word.startswith("launch/"))
    if not (ROOT / template).is_file():
        raise NotAccepted(f"{template} is not there")
    if words[0] == "sbatch":  # what follows the script goes to pretrain
        parse_module("mimir_fast.pretrain", words[list(words).index(template) + 1 :])
