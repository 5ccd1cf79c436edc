"""Command lines that cannot be meant: each is refused by name in a real process, before anything is created."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from chaos.runs import Runs

BAD_INPUT = "bad value on a command line"
TRAIN_OR_MEASURE = ("mimir_fast.pretrain", "mimir_fast.finetune", "mimir_fast.evaluate", "mimir_fast.probe")
SAMPLE = 120  # of thousands, in one story; all of them in one process: tests/training/test_bad_input.py
NOT_IN_FLAGS = ("objective", "optim", "run")  # their options stand at the top of the command line
BAD: dict[Any, tuple[str, ...]] = {
    float: ("nan", "inf", "-inf", "1/0", "much"),
    int: ("-5", "1.5", "many"),
    float | None: ("nan", "inf", "much"),
    int | None: ("-5", "1.5", "many"),
}
WORDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("--method", ("mim",)), ("--recipe", ("digits/mimir_vit_nana",)), ("--output_dir", ()), ("--no_such_option", ()),
    ("--device", ("gpu",)), ("--strategy", ("dpp",)), ("--precision", ("fp8",)), ("--data.source", ("digit",)),
    ("--data.loader", ("fast",)), ("--ema_decay", ("1",)), ("--shard_ranks", ("2",)),
    ("--model.encoder", ("enormous",)),
)  # fmt: skip


def bad_command_lines(runs: Runs, run: Path, rng: random.Random) -> dict[str, int]:
    """NaN, infinity, negative sizes and words where numbers are wanted, in every option of every method."""
    lines = rng.sample(sorted(set(cases()), key=str), SAMPLE)
    for module, base, flag, value in lines:
        line = [*base, *(["--output_dir", str(run)] if module in TRAIN_OR_MEASURE else []), flag, *value]
        process = runs.zygote.start(module, line)
        code, said = process.wait(60), " ".join(process.said().split())
        assert code == 2, f"{module} {line} ended with {code}: {said}"
        assert "Traceback" not in said, f"{module} {line}: {said}"
        assert is_named(flag, value, said), f"{module} {line} is not named: {said}"
        assert not run.exists(), f"{module} {line} made the folder"
    return {BAD_INPUT: len(lines)}


def is_named(flag: str, value: tuple[str, ...], said: str) -> bool:
    """Whether a message speaks of the option or of its value."""
    return flag.removeprefix("--").rpartition(".")[2] in said or any(v in said for v in value)


def parsers() -> dict[str, tuple[Callable[[Sequence[str]], Any], list[tuple[str, ...]]]]:
    """Module → its parser, and beginnings of its command line, one for each set of options."""
    from mimir_fast import compare, evaluate, export, finetune, pretrain, probe, publish, reproduce
    from mimir_fast.cli import parse
    from mimir_fast.data.prepare import PrepareConfig
    from mimir_fast.methods.registry import all_methods

    return {
        "mimir_fast.pretrain": (pretrain.config_from, [("--method", m) for m in all_methods("pretrain")]),
        "mimir_fast.finetune": (finetune.config_from, [("--method", m) for m in all_methods("finetune")]),
        "mimir_fast.evaluate": (evaluate.config_from, [("--checkpoint", "robust.pth")]),
        "mimir_fast.probe": (probe.config_from, [("--checkpoint", "robust.pth")]),
        "mimir_fast.compare": (compare.config_from, [("runs/a", "runs/b")]),
        "mimir_fast.reproduce": (reproduce.config_from, [("digits_demo",), ("fashion_ablation",), ("faster",)]),
        "mimir_fast.hub": (partial(parse, publish.HubConfig), [("runs/a", "--output", "hub/a")]),
        "mimir_fast.export": (partial(parse, export.ExportConfig), [("runs/a", "--output", "a.safetensors")]),
        "mimir_fast.data.prepare": (partial(parse, PrepareConfig), [("images", "shards")]),
    }


def cases() -> Iterator[tuple[str, tuple[str, ...], str, tuple[str, ...]]]:
    """Module, the line's beginning, flag, and its bad value."""
    for module, (config_from, beginnings) in parsers().items():
        for base in beginnings:
            for flag, kind in _flags(config_from(base)):
                for bad in _bad(kind):
                    yield module, base, flag, (bad,)
        if module in TRAIN_OR_MEASURE[:2]:
            for flag, value in WORDS:
                yield module, beginnings[0], flag, value


def _bad(kind: Any) -> tuple[str, ...]:
    """Values that an option of this type cannot have."""
    return ("no such word",) if get_origin(kind) is Literal and str in map(type, get_args(kind)) else BAD.get(kind, ())


def _flags(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every option and its type."""
    kinds = get_type_hints(type(config))
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from _flags(value, prefix if field.name in NOT_IN_FLAGS else f"{prefix}{field.name}.")
        else:
            yield f"--{prefix}{field.name}", kinds[field.name]
