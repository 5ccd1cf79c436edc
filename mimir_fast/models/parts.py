"""The encoders in a file: which state dicts are there, under which keys and prefixes, and which of them is meant.

A file of the field nests its state dict under keys (`model`, `state_dict`, `teacher` …), and wrappers put words into
the names of its tensors (`module.`, `_orig_mod.` …). Where several encoders are there, the choice is the caller's, or
one that is known and named; never the order in a file.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from mimir_fast.checkpoints.reading import WeightsError
from mimir_fast.models.beside import harmless, is_statistic
from mimir_fast.validation import counted, nearest

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
_CLASSIFIERS = {"head.weight", "classifier.weight", "fc.weight", "linear.weight"}


@dataclass(frozen=True)
class Part:
    """One encoder of a file.

    Attributes:
        path: keys and prefix under which it stands, as words.
        tensors: of the encoder, without the prefix.
        siblings: what stands beside it in the same model: a head, a decoder; under names without the model's prefix.
        outside: further tensors of the file, under their full names.
        others: first words of the names of other encoders in it.
        beside: other things in the file and in the folder, by name: `args`, `config`, `metadata` …
        average: it is a moving average of trained weights.
    """

    path: tuple[str, ...]
    tensors: dict[str, Tensor]
    siblings: dict[str, Tensor] = field(default_factory=dict)
    outside: dict[str, Tensor] = field(default_factory=dict)
    others: frozenset[str] = frozenset()
    beside: Mapping[str, Any] = field(default_factory=dict)
    average: bool = False

    @property
    def name(self) -> str:
        """The word by which it is asked for."""
        plain = _PLAIN | {word for word in self.path if _says_average(word) or word.isdigit()}
        words = [word for word in self.path if word not in plain]
        return words[0] if words else ".".join(self.path)

    @property
    def around(self) -> dict[str, Tensor]:
        """What stands beside it, in the same model or not."""
        return self.outside | self.siblings

    @property
    def classifies(self) -> bool:
        """It has a linear classification head, inside or beside it."""
        return bool(_CLASSIFIERS & (self.tensors.keys() | self.siblings.keys()))

    def equals(self, other: "Part") -> bool:
        """Whether both hold the same numbers, as copies that a training script saved twice."""
        mine, theirs = self.tensors, other.tensors
        return mine.keys() == theirs.keys() and all(_equal(mine[name], theirs[name]) for name in mine)


def find_parts(content: Any, beside: Mapping[str, Any], anchors: Iterable[str], origin: str) -> list[Part]:
    """Every encoder in the content of a file.

    Args:
        anchors: names of tensors by which encoders are found, under any prefix.
    Raises:
        WeightsError: there is none; the message says what there is.
    """
    known = set(anchors)
    parts: list[Part] = []
    rest: dict[str, Tensor] = {}
    for keys, tensors, others in _state_dicts(content):
        found = list(_split(keys, unwrap(tensors), {**others, **beside}, known))
        parts += found
        if not found:  # single numbers are scores
            rest |= {".".join((*keys, n)): t for n, t in tensors.items() if t.is_floating_point() and t.numel() > 1}
    parts = [replace(part, outside=part.outside | rest) for part in parts]
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
        raise WeightsError(f"{origin} holds no moving average: leave that choice of weights out")
    if which == "model" and not trained:
        raise WeightsError(f"{origin} holds a moving average only: leave that choice of weights out")
    parts = averages if averages and which != "model" else trained
    for first, second in _PREFERRED:
        # A teacher with classes is distilled from, and often another network than the student.
        asks = first == "teacher" and any(part.classifies for part in parts)
        if not asks and {first, second} <= {word for part in parts for word in part.path}:
            parts = [part for part in parts if second not in part.path]
    parts = [part for index, part in enumerate(parts) if not any(part.equals(other) for other in parts[:index])]
    if len(parts) > 1:
        names = list(dict.fromkeys(part.name for part in parts))
        raise WeightsError(
            f"{origin} holds {len(parts)} encoders: {', '.join(names)}. Say which: --init_part {names[0]} (finetune, "
            f"pretrain), --part {names[0]} (all others)"
        )
    return parts[0]


def other_names(parts: Sequence[Part], chosen: Part) -> list[str]:
    """Where the encoders of other numbers than the chosen one stand."""
    return sorted({".".join(part.path) or "(no key)" for part in parts if not chosen.equals(part)})


def unwrap(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names without the words of torch's wrappers, unless two would then be the same."""
    plain = {".".join(w for w in name.split(".") if w not in _WRAPPERS) or name: t for name, t in tensors.items()}
    return plain if len(plain) == len(tensors) else dict(tensors)


def _state_dicts(
    content: Any, keys: tuple[str, ...] = (), outer: Mapping[str, Any] | None = None
) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor], dict[str, Any]]]:
    """(keys, tensors, what else stands beside on the way) of every dict that holds tensors."""
    if isinstance(content, (list, tuple)):
        content = {str(index): inner for index, inner in enumerate(content) if isinstance(inner, dict)}
    if not isinstance(content, dict) or len(keys) > MAX_DEPTH:
        return
    others = dict(outer or {}) | {k: v for k, v in content.items() if isinstance(k, str) and not _large(v)}
    if tensors := {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}:
        yield keys, tensors, others
    for key, inner in content.items():
        if isinstance(key, str) and "optim" not in key.lower():
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
        beside_it = {name: inside.pop(name) for name in [*inside] if _is_beside(name, inside[name])}
        model = prefix.removesuffix(".").rpartition(".")[0]
        model = f"{model}." if model else ""
        rest = {name: t for name, t in tensors.items() if owner[name] is None}
        siblings = {n.removeprefix(model): t for n, t in rest.items() if n.startswith(model)} if prefix else {}
        outside = {} if not prefix else {n: t for n, t in rest.items() if not n.startswith(model)}
        path = (*keys, *[word for word in prefix.split(".") if word])
        counted = _AVERAGED in beside_it or _AVERAGED in siblings
        average = counted or any(map(_says_average, path))
        others = frozenset(other.partition(".")[0] for other in prefixes if other) - {prefix.partition(".")[0]}
        yield Part(path, inside, siblings | beside_it, outside, others, beside, average)


def _is_beside(name: str, tensor: Tensor) -> bool:
    """What a model may hold under the prefix of its encoder, and no layout reads: statistics, heads for training."""
    read = name.startswith(("decoder_", "mask_token", "masked_embed"))
    return is_statistic(name, tensor) or (not read and bool(harmless(name)))


def _equal(one: Tensor, other: Tensor) -> bool:
    if (one.shape, one.dtype, one.layout) != (other.shape, other.dtype, other.layout):
        return False
    if one.is_meta or one.is_quantized or one.layout != torch.strided:
        return False
    # As bytes, which any dtype has.
    shared = one.data_ptr() == other.data_ptr() and one.stride() == other.stride()
    return shared or torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (one, other)))


def _says_average(word: str) -> bool:
    return bool(re.search(r"(^|_)(ema|avg|averaged?|swa|shadow)($|_|\d)|EMA|Ema([A-Z]|$)", word))


def _outline(content: Any) -> str:
    """What is there instead, in a few words."""
    found = max(_state_dicts(content), key=lambda entry: len(entry[1]), default=None)
    if found is not None:
        keys, tensors, _ = found
        where = f"under {'.'.join(keys)} " if keys else ""
        return f"{where}it has {counted(len(tensors), 'tensor')}, such as {', '.join(list(tensors)[:4])}"
    if isinstance(content, dict):
        return f"it has no tensors at all, only {', '.join(map(str, list(content)[:6])) or 'an empty dict'}"
    return f"it has no named tensors, it is a {type(content).__name__}"
