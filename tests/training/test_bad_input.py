"""Every field of every configuration refuses what it cannot mean, where it is defined, before anything is created."""

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from chaos.bad_input import cases, is_named, parsers
from commands import Command

from mimir_fast.finetune import config_from as finetuning
from mimir_fast.pretrain import config_from as pretraining

NAN, INF = math.nan, math.inf


def parts(config: Any) -> Iterator[Any]:
    """The configurations inside a configuration, and itself."""
    yield config
    for field in fields(config):
        if is_dataclass(value := getattr(config, field.name)):
            yield from parts(value)


def every_part() -> dict[str, Any]:
    """By class name, from all methods' configurations."""
    tops = [pretraining(["--method", m]) for m in ("mae", "adv_mae", "mimir")]
    tops += [finetuning(["--method", m]) for m in ("pgd", "trades", "mart", "ard_prm")]
    return {type(part).__name__: part for top in tops for part in parts(top)}


def bad_values(value: Any) -> list[Any]:
    """What no number of ours can mean: NaN and infinity for floats, a negative size, count or seed for ints."""
    if isinstance(value, bool):
        return []
    if isinstance(value, float):
        return [NAN, INF, -INF]
    if isinstance(value, int):
        return [-5, -(2**40)]
    if isinstance(value, tuple) and value and isinstance(value[0], float):
        return [(NAN, *value[1:]), (*value[:-1], INF)]
    return []


PARTS = every_part()
CASES = [
    (n, f.name, bad) for n, part in PARTS.items() for f in fields(part) for bad in bad_values(getattr(part, f.name))
]
OPTIONAL = [
    ("RunConfig", name, bad) for name in ("max_steps", "stop_after", "micro_batch", "shard_ranks") for bad in (0, -5)
]
OPTIONAL += [("RunConfig", "clip_grad", bad) for bad in (-1.0, 0.0, NAN)] + [("OptimizerConfig", "lr", NAN)]


@pytest.mark.parametrize(("part", "name", "bad"), CASES + OPTIONAL)
def test_numbers(part: str, name: str, bad: Any) -> None:
    with pytest.raises(ValueError) as error:
        replace(PARTS[part], **{name: bad})
    assert name in str(error.value) or str(bad) in str(error.value), f"{name} is not named: {error.value}"


def test_there_are_many() -> None:
    assert len(CASES) + len(OPTIONAL) >= 120


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--attack.eps", "8"], "8 looks like 8/255"),
        (["--attack.eps", "8/0"], "divides by zero"),
        (["--attack.eps", "nan"], "eps=nan"),
        (["--attack.alpha", "-1/255"], "at least 0"),
        (["--clip_grad", "-1"], "clip_grad=-1"),
        (["--epochs", "-5"], "epochs=-5"),
        (["--lr", "nan"], "finite number"),
        (["--blr", "inf"], "finite number"),
        (["--betas", "0.9", "1.0"], "less than 1"),
        (["--save_every", "0"], "at least 1"),
        (["--device", "gpu"], "cpu, cuda or cuda:N"),
        (["--shard_ranks", "2"], "belongs to --strategy fsdp"),
        (["--ema_decay", "1"], "0.9999 is usual"),
        (["--output_dir"], "output_dir"),
        (["--no_such_flag"], "no_such_flag"),
    ],
)
def test_command_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((SystemExit, ValueError)) as error:
        pretraining(flags)
    out = capsys.readouterr()
    assert message in " ".join((out.out + out.err + str(error.value)).replace("│", " ").split())


@pytest.mark.slow
def test_every_option_of_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Thousands of lines; tests/chaos gives some of them to real processes."""
    accepted, unnamed, table = [], [], parsers()
    for module, base, flag, value in sorted(set(cases()), key=str):
        try:
            table[module][0]([*base, flag, *value])
            accepted.append((module, base, flag, value))
        except (SystemExit, ValueError) as error:
            out = capsys.readouterr()
            if not is_named(flag, value, " ".join((out.out + out.err + str(error)).split())):
                unnamed.append((module, base, flag, value, str(error)))
    assert not accepted and not unnamed


def test_nothing_is_created_for_a_bad_value(command: Command, tmp_path: Path) -> None:
    out = command("mimir_fast.pretrain", "--lr", "nan", "--output_dir", str(tmp_path / "run"))
    assert out.returncode == 2 and "Traceback" not in out.stderr and not (tmp_path / "run").exists()
