"""What a family can do beside its plain form, as it is typed: `layer_scale registers=4`.

A family says what it knows as {name: default}; a tuple of words stands for one of these, the first by default.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from mimir_fast.validation import check_choice, check_number, nearest

_SWITCH = {"true": True, "1": True, "false": False, "0": False}


def parse_options(texts: Iterable[str], known: Mapping[str, Any], title: str) -> dict[str, Any]:
    """{name: value of the default's type} of NAME (true) and NAME=VALUE, without what is the default anyway.

    Args and errors as of `typed_options`.
    """
    return differing(typed_options(texts, known, title), known)


def typed_options(texts: Iterable[str], known: Mapping[str, Any], title: str) -> dict[str, Any]:
    """The same with the defaults that are typed, which go before what somebody else says.

    Args:
        title: of the family, for messages.
    Raises:
        ValueError: an unknown name (the nearest is suggested), one given twice, or a value of another kind.
    """
    options: dict[str, Any] = {}
    for text in texts:
        name, given, value = text.partition("=")
        if name not in known:
            there_are = f"There are {', '.join(known)}" if known else f"{title} has none"
            raise ValueError(f"unknown option of {title} {name!r}{nearest(name, known)} {there_are}")
        if name in options:
            raise ValueError(f"option {name} of {title} is given twice")
        options[name] = _value(name, value if given else "true", known[name])
    return options


def _value(name: str, text: str, default: Any) -> Any:
    if isinstance(default, tuple):
        check_choice(name, text, default)
        return text
    if isinstance(default, bool):
        check_choice(name, text.lower(), tuple(_SWITCH))
        return _SWITCH[text.lower()]
    try:
        value = type(default)(text)
    except ValueError:
        kind = "a whole number" if isinstance(default, int) else "a number"
        raise ValueError(f"option {name}={text!r}, wanted {kind}") from None
    check_number(name, value)
    return value


def differing(options: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are not at their defaults, in the order of `known`."""
    defaults = {name: default[0] if isinstance(default, tuple) else default for name, default in known.items()}
    return {name: options[name] for name in known if name in options and options[name] != defaults[name]}


def option_texts(options: Mapping[str, Any]) -> tuple[str, ...]:
    """As they are typed: `parse_options` the other way."""
    return tuple(
        name if value is True else f"{name}={str(value).lower() if value is False else value}"
        for name, value in options.items()
    )
