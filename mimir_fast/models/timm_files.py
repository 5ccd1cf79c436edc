"""Weights of any model of timm's, from a file that our own guarded reader opens; timm before 1.0.26 runs its code."""

import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from mimir_fast.models.opening import open_file
from mimir_fast.models.parts import state_dict_of
from mimir_fast.models.weight_files import WeightsError


def fill_timm(model: Any, path: Path, name: str) -> None:
    """Put the weights in a file into a model of timm's class `name`; the moving average where there is one.

    Raises:
        WeightsError: unreadable, or of another model: by the names of the tensors that do not fit.
    """
    tensors = state_dict_of(open_file(path).content, str(path))
    # Files of a model's authors are renamed by a function beside its class.
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if (reason := _misfit(model, tensors)) and convert is not None:
        try:
            converted = convert(dict(tensors), model)
        except Exception:  # it is written for files of that model and expects their names
            converted = tensors
        if not _misfit(model, converted):
            tensors, reason = converted, ""
    if reason:
        raise WeightsError(f"{path} is no file of timm's {name}: {reason}")
    model.load_state_dict(tensors, strict=True)


def _misfit(model: Any, tensors: dict[str, Tensor]) -> str:
    own = model.state_dict()
    missing, unknown = [n for n in own if n not in tensors], [n for n in tensors if n not in own]
    shaped = [n for n, t in tensors.items() if n in own and t.shape != own[n].shape]
    words = [f"{', '.join(found[:3])} ({len(found)}) {what}" for found, what in
             ((missing, "missing"), (unknown, "unknown")) if found]  # fmt: skip
    words += [f"{n} is {tuple(tensors[n].shape)}, wanted {tuple(own[n].shape)}" for n in shaped[:1]]
    return "; ".join(words)
