"""Command lines that cannot be meant: each is refused by name in a real process, before anything is created."""

import random
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from chaos.runs import Runs

BAD_INPUT = "bad value on a command line"
SAMPLE = 120  # of some hundred, in one story
NOT_IN_FLAGS = ("objective", "optim", "run")  # their options stand at the top of the command line
BAD: dict[Any, tuple[str, ...]] = {
    float: ("nan", "inf", "-inf", "1/0", "much"),
    int: ("-5", "1.5", "many"),
    float | None: ("nan", "inf", "much"),
    int | None: ("-5", "1.5", "many"),
}
WORDS: tuple[tuple[str, str | None], ...] = (
    ("--method", "mim"), ("--recipe", "digits/mimir_vit_nana"), ("--output_dir", None), ("--no_such_option", None),
    ("--device", "gpu"), ("--strategy", "dpp"), ("--precision", "fp8"), ("--data.source", "digit"),
    ("--data.loader", "fast"), ("--ema_decay", "1"), ("--shard_ranks", "2"), ("--model.encoder", "enormous"),
)  # fmt: skip
MODULES = {
    "mimir_fast.pretrain": ("mae", "adv_mae", "mimir", "simmim", "aemim", "single_stage"),
    "mimir_fast.finetune": ("natural", "pgd", "fast", "apgd", "trades", "mart", "ard_prm"),
}


def bad_command_lines(runs: Runs, run: Path, rng: random.Random) -> dict[str, int]:
    """NaN, infinity, negative sizes and words where numbers are wanted, in every option of every method."""
    lines = rng.sample(sorted(set(cases()), key=str), SAMPLE)
    for module, method, flag, value in lines:
        line = ["--method", method, "--output_dir", str(run), *([flag] if value is None else [flag, value])]
        process = runs.zygote.start(module, line)
        code, said = process.wait(60), " ".join(process.said().split())
        assert code == 2, f"{module} {line} ended with {code}: {said}"
        assert "Traceback" not in said, f"{module} {line}: {said}"
        name = flag.removeprefix("--").rpartition(".")[2]
        assert name in said or str(value) in said, f"{module} {line} is not named: {said}"
        assert not run.exists(), f"{module} {line} made the folder"
    return {BAD_INPUT: len(lines)}


def cases() -> Iterator[tuple[str, str, str, str | None]]:
    """Module, method, flag and value."""
    from mimir_fast import finetune, pretrain

    for module, methods in MODULES.items():
        config_from = {"mimir_fast.pretrain": pretrain.config_from, "mimir_fast.finetune": finetune.config_from}[module]
        for method in methods:
            for flag, kind in _flags(config_from(["--method", method])):
                for bad in BAD.get(kind, ()):
                    yield module, method, flag, bad
        for flag, value in WORDS:
            yield module, methods[0], flag, value


def _flags(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every option and its type."""
    kinds = get_type_hints(type(config))
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from _flags(value, prefix if field.name in NOT_IN_FLAGS else f"{prefix}{field.name}.")
        else:
            yield f"--{prefix}{field.name}", kinds[field.name]
