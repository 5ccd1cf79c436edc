"""The encoders in a file: which state dicts are there, under which keys and prefixes, and which of them is meant.

A file of the field nests its state dict under keys (`model`, `state_dict`, `teacher` …), and wrappers put words into
the names of its tensors (`module.`, `_orig_mod.` …). Where several encoders are there, the choice is the caller's, or
one that is known and named; never the order in a file.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from mimir_fast.checkpoints.reading import WeightsError
from mimir_fast.validation import nearest

WeightsChoice = Literal["auto", "model", "ema"]

# Words that torch's wrappers put into names, wherever they stand.
_WRAPPERS = {"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module"}
# Words that say nothing about which encoder it is.
_PLAIN = {"model", "state_dict", "model_state_dict", "model_state", "net", "network", "module", "params", "weights",
          "base_model", "encoder", "checkpoint", "state"}  # fmt: skip
# Of two encoders in one file, the one that its authors evaluate.
_PREFERRED = (
    ("teacher", "student"),
    ("base_encoder", "momentum_encoder"),
    ("backbone", "momentum_backbone"),
)
MAX_DEPTH = 5
_AVERAGED = "n_averaged"  # in a state dict of torch's AveragedModel
# A normalisation in front of the encoder has these.
STATISTICS = {"mean": "std", "mu": "sigma", "std": "mean", "sigma": "mu"}


@dataclass(frozen=True)
class Part:
    """One encoder of a file.

    Attributes:
        path: keys and prefix under which it stands, as words.
        tensors: of the encoder, without the prefix.
        siblings: what stands beside it in the same model: a head, a decoder; under names without the model's prefix.
        outside: further tensors of the same state dict, under their full names.
        beside: other things in the file and in the folder, by name: `args`, `config`, `metadata` …
        average: it is a moving average of trained weights.
    """

    path: tuple[str, ...]
    tensors: dict[str, Tensor]
    siblings: dict[str, Tensor] = field(default_factory=dict)
    outside: dict[str, Tensor] = field(default_factory=dict)
    beside: Mapping[str, Any] = field(default_factory=dict)
    average: bool = False

    @property
    def name(self) -> str:
        """The word by which it is asked for."""
        words = [word for word in self.path if word not in _PLAIN and not _says_average(word)]
        return words[0] if words else ".".join(self.path)


def find_parts(content: Any, beside: Mapping[str, Any], anchors: Iterable[str], origin: str) -> list[Part]:
    """Every encoder in the content of a file.

    Args:
        anchors: names of tensors by which encoders are found, under any prefix.
    Raises:
        WeightsError: there is none; the message says what there is.
    """
    known = set(anchors)
    parts: list[Part] = []
    for keys, tensors, others in _state_dicts(content):
        parts += _split(keys, unwrap(tensors), {**others, **beside}, known)
    if not parts:
        raise WeightsError(f"{origin} holds no vision transformer: {_outline(content)}. Wanted a checkpoint of "
                           "mimir_fast, of the MIMIR authors, of MAE, DINO, timm or transformers, of one of our "
                           "families")  # fmt: skip
    return parts


def choose(parts: Sequence[Part], which: WeightsChoice, wanted: str, origin: str) -> Part:
    """The part that is asked for, the only one, or the one that its authors evaluate.

    Args:
        which: its trained weights, their moving average, or the average where there is one.
        wanted: its name; empty for the usual one.
    Raises:
        WeightsError: no such part, no moving average, or several and no reason to take one.
    """
    names = list(dict.fromkeys(part.name for part in parts if part.name))
    if wanted:
        found = [part for part in parts if wanted == part.name or wanted in part.path]
        if not found:
            raise WeightsError(
                f"{origin} has no part {wanted!r}{nearest(wanted, names)} "
                f"{'There are ' + ', '.join(names) if names else 'It holds one encoder: leave the part out'}"
            )
        parts = found
    averages = [part for part in parts if part.average]
    trained = [part for part in parts if not part.average]
    if which == "ema" and not averages:
        raise WeightsError(f"{origin} holds no moving average: take weights=model (--init_weights model)")
    if which == "model" and not trained:
        raise WeightsError(f"{origin} holds a moving average only: take weights=ema (--init_weights ema)")
    parts = averages if averages and which != "model" else trained
    for first, second in _PREFERRED:
        if {first, second} <= {word for part in parts for word in part.path}:
            parts = [part for part in parts if second not in part.path]
    if len(parts) > 1:
        raise WeightsError(
            f"{origin} holds {len(parts)} encoders: {', '.join(names)}. Say which: --init_part {names[0]} (finetune, "
            f"pretrain), --part {names[0]} (evaluate, export)"
        )
    return parts[0]


def unwrap(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names without the words of torch's wrappers, unless two would then be the same."""
    plain = {".".join(w for w in name.split(".") if w not in _WRAPPERS) or name: t for name, t in tensors.items()}
    return plain if len(plain) == len(tensors) else dict(tensors)


def _state_dicts(
    content: Any, keys: tuple[str, ...] = (), outer: Mapping[str, Any] | None = None
) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor], dict[str, Any]]]:
    """(keys, tensors, what else stands beside on the way) of every dict that holds tensors."""
    if not isinstance(content, dict) or len(keys) > MAX_DEPTH:
        return
    others = dict(outer or {}) | {k: v for k, v in content.items() if isinstance(k, str) and not _large(v)}
    if tensors := {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}:
        yield keys, tensors, others
    for key, inner in content.items():
        if isinstance(key, str) and key != "optimizer":
            yield from _state_dicts(inner, (*keys, key), others)


def _large(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, dict) and any(isinstance(v, Tensor) for v in value.values()))


def _split(
    keys: tuple[str, ...], tensors: dict[str, Tensor], beside: dict[str, Any], anchors: set[str]
) -> Iterator[Part]:
    """The encoders of one state dict, by the prefixes in front of an anchor."""
    prefixes = sorted(
        {
            name.removesuffix(anchor)
            for name in tensors
            for anchor in anchors
            if name == anchor or name.endswith("." + anchor)
        },
        key=len,
    )
    # A prefix within another one: of one model if its words are the model's own, as in `vit.` beside `decoder.`.
    owner = {name: max((p for p in prefixes if name.startswith(p)), key=len, default=None) for name in tensors}
    for prefix in prefixes:
        inside = {name.removeprefix(prefix): t for name, t in tensors.items() if owner[name] == prefix}
        statistics = {name: inside.pop(name) for name in [*inside] if _is_statistic(name, inside[name])}
        model = prefix.removesuffix(".").rpartition(".")[0]
        model = f"{model}." if model else ""
        rest = {name: t for name, t in tensors.items() if owner[name] is None}
        siblings = {n.removeprefix(model): t for n, t in rest.items() if n.startswith(model)} if prefix else {}
        outside = {} if not prefix else {n: t for n, t in rest.items() if not n.startswith(model)}
        path = (*keys, *[word for word in prefix.split(".") if word])
        counted = inside.pop(_AVERAGED, None) is not None or _AVERAGED in siblings
        average = counted or any(map(_says_average, path))
        yield Part(path, inside, siblings | statistics, outside, beside, average)


def _is_statistic(name: str, tensor: Tensor) -> bool:
    """Mean or std of the images, which a model may hold beside its encoder's tensors."""
    return name.rpartition(".")[2] in STATISTICS and tensor.numel() <= 4


def _says_average(word: str) -> bool:
    return bool(re.search(r"(^|_)(ema|averaged?|swa)($|_|\d)", word))


def _outline(content: Any) -> str:
    """What is there instead, in a few words."""
    found = max(_state_dicts(content), key=lambda entry: len(entry[1]), default=None)
    if found is not None:
        keys, tensors, _ = found
        where = f"under {'.'.join(keys)} " if keys else ""
        return f"{where}it has {len(tensors)} tensors, such as {', '.join(list(tensors)[:4])}"
    if isinstance(content, dict):
        return f"it has no tensors at all, only {', '.join(map(str, list(content)[:6])) or 'an empty dict'}"
    return f"it has no named tensors, it is a {type(content).__name__}"
