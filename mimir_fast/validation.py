"""Checking what configurations hold, where they are defined: one wording; NaN and infinity are never let through."""

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import Field, fields, is_dataclass
from numbers import Real
from typing import Any, Literal, get_args, get_origin


def parse_float(text: str) -> float:
    """A float, or a fraction such as 8/255.

    Raises:
        ValueError: it is neither.
    """
    numerator, slash, denominator = text.partition("/")
    if slash and float(denominator) == 0:
        raise ValueError(f"{text} divides by zero")
    return float(numerator) / float(denominator) if slash else float(text)


def number_of(name: str, value: float | str) -> float:
    """A number, or the text of one as it is typed, such as "8/255".

    Raises:
        ValueError: naming what is neither.
    """
    try:
        return parse_float(value) if isinstance(value, str) else value
    except ValueError:
        raise ValueError(f"{name}={value!r}, wanted a number or a fraction such as 8/255") from None


def check_number(
    name: str, value: float, *, at_least: float = -math.inf, above: float = -math.inf, at_most: float = math.inf,
    below: float = math.inf, hint: str = "",
) -> None:  # fmt: skip
    """Refuse a number outside of a range.

    Raises:
        ValueError: it is outside, or no finite number.
    """
    if not isinstance(value, Real):
        raise ValueError(f"{name}={value!r}, wanted a number")
    if math.isfinite(value) and at_least <= value <= at_most and above < value < below:
        return
    low = f"at least {at_least:g}" if above == -math.inf else f"more than {above:g}"
    high = f"at most {at_most:g}" if below == math.inf else f"less than {below:g}"
    wanted = [text for text in (low, high) if not text.endswith("inf")] or ["a finite number"]
    raise ValueError(f"{name}={value:g}, wanted {' and '.join(wanted)}{f' ({hint})' if hint else ''}")


def check_fields(config: Any, prefix: str = "") -> None:
    """Refuse NaN and infinity in any field of a dataclass, also within tuples, and what is none of a field's choices.

    The command line refuses both earlier; Python does not look at annotations.

    Args:
        prefix: of the fields' names, as they are typed.
    Raises:
        ValueError: naming the field.
    """
    for field in fields(config):
        value = getattr(config, field.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{prefix}{field.name}={number}, wanted a finite number")
        if get_origin(field.type) is Literal:
            check_choice(f"{prefix}{field.name}", value, get_args(field.type))


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Refuse what is not among the choices; typos in Python code come here, those of command lines end earlier.

    Raises:
        ValueError: naming them.
    """
    if value not in choices:
        raise ValueError(f"{name}={value!r}, wanted one of {', '.join(map(str, choices))}")


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?` or a full stop, for messages about an unknown name."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f"; did you mean {close[0]}?" if close else "."


def counted(number: int, one: str, many: str = "") -> str:
    """A number and what it is of, `1 image` or `2 images`; `many` where it takes more than an s: 2 lines name."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def without(switch: Any, why: str, *options: str) -> dict[str, str]:
    """{option: why} where the switch is off: what a dataclass returns from `idle`, by which options do nothing now.

    Args:
        switch: anything that is true or false.
        why: what is off, as "--{}rank is 0"; {} stands for the flags in front of the option's name.
        options: names of the dataclass's fields, a.b for one inside.
    """
    return {} if switch else dict.fromkeys(options, why)


def idle_options(config: Any, prefix: str = "") -> dict[str, str]:
    """{flag: why} of the options of a (nested) dataclass that do nothing as the others are.

    Each dataclass in there may have a method `idle`, see `without`.
    """
    own = config.idle() if hasattr(config, "idle") else {}
    found = {f"{prefix}{name}": why.replace("{}", prefix) for name, why in own.items()}
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            found |= idle_options(value, prefix if is_bare(field) else f"{prefix}{field.name}.")
    return found


def is_bare(field: Field[Any]) -> bool:
    """Annotated[…, tyro.conf.arg(name="")]: a dataclass inside another whose options are typed without a prefix."""
    return any(getattr(note, "name", None) == "" for note in getattr(field.type, "__metadata__", ()))


def refuse_idle(config: Any, args: Sequence[str]) -> None:
    """Refuse a typed option that does nothing; those of recipes and presets wait for their switch.

    Raises:
        ValueError: naming the first such option and what is off.
    """
    idle = idle_options(config)
    for arg in args:
        if arg.startswith("--"):
            groups, dot, name = arg[2:].partition("=")[0].replace("-", "_").rpartition(".")
            flags = (f"{groups}{dot}{name}", f"{groups}{dot}{name.removeprefix('no_')}")
            nothing = arg.partition("=")[2] == "None"  # a file's or Python's way to leave an option out
            if not nothing and (why := next((idle[flag] for flag in flags if flag in idle), "")):
                raise ValueError(f"{arg.partition('=')[0]} does nothing while {why}: change that too, or leave it out")
