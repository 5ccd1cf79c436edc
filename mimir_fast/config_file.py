"""Options from a file: `--config FILE`, a YAML, TOML or JSON file or the config.json of a run, and from Python.

The file holds what would be typed, by the same names, nested or not: `batch_size: 64`, `data.root: images`,
`attack: {eps: 8/255}`. It becomes words in front of those that are typed, so one parser reads and checks both, and what
is typed wins.
"""

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mimir_fast.extensions import import_extension, saved_imports

FLAG = "--config"
_UNNAMED = ("objective", "optim", "run")  # parts of a run's configuration whose options are typed without a prefix
_OF_A_RUN = ("format", "derived")  # what config.json says beside options


def with_config_files(args: Sequence[str]) -> list[str]:
    """The words of a command line with those of its `--config` files in front.

    Raises:
        ValueError: no name behind the flag, or a file that cannot be read as options.
    """
    from_files, typed = list[str](), list[str]()
    words = iter(args)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag != FLAG:
            typed.append(word)
        elif not (path := value if equals else next(words, "")):
            raise ValueError(f"{FLAG} wants a file of options")
        else:
            from_files += words_of(read_options(Path(path)))
    return [*from_files, *typed]


def read_options(path: Path) -> dict[str, Any]:
    """What a file of options holds; of a run's folder its config.json.

    Raises:
        ValueError: another suffix, or no table of names.
        OSError: it cannot be read.
        ImportError: a run asks for a module that is not there, or that came with it.
    """
    path = path / "config.json" if path.is_dir() else path
    text, suffix = path.read_text(), path.suffix.lower()
    try:
        if suffix in (".yaml", ".yml"):
            import yaml

            found = yaml.safe_load(text)
        elif suffix == ".toml":
            found = tomllib.loads(text)
        elif suffix == ".json":
            found = json.loads(text)
        else:
            raise ValueError("wanted a name that ends in .yaml, .toml or .json")
    except Exception as error:  # each library raises its own
        raise ValueError(f"{FLAG} {path}: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{FLAG} {path}: wanted names of options and their values")
    if path.name == "config.json":  # of a run, perhaps a stranger's: no module is imported that came with it
        for name in saved_imports(str(path)):
            import_extension(name, str(path))
    return {name: value for name, value in found.items() if name not in _OF_A_RUN}


def words_of(options: Mapping[str, Any]) -> list[str]:
    """Options by name, nested as in config.json, as they are typed."""
    return [word for name, value in options.items() for word in _words(name, value, "")]


def _words(name: str, value: Any, prefix: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        inner = prefix if not prefix and name in _UNNAMED else f"{prefix}{name}."
        for key, item in value.items():
            yield from _words(str(key), item, inner)
    elif not prefix and name == "imports":
        for module in [value] if isinstance(value, str) else value or ():
            yield from ("--import", str(module))
    elif isinstance(value, bool):
        groups, dot, last = f"{prefix}{name}".rpartition(".")
        yield f"--{groups}{dot}{'' if value else 'no_'}{last}"
    elif isinstance(value, (list, tuple)):
        yield from (f"--{prefix}{name}", *map(str, value))
    elif value is None or str(value)[:1] in ("", "-"):
        yield f"--{prefix}{name}={value}"  # one word: it is no option's name, and None leaves the option out
    else:
        yield from (f"--{prefix}{name}", str(value))  # the parser finds names like a wrong one without its value only
