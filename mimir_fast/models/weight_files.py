"""Reading weights, whoever wrote them, without ever running code from the file.

    ours       a run folder, one of its checkpoints, or a .safetensors file written by mimir_fast.export
    authors'   .pth: {model, optimizer, epoch, scaler, args}, bare, or under `model_state_dict` with a prefix
    timm       a .safetensors or .pth file, or `timm:NAME` for weights timm downloads

Pickled files are opened with torch's weights-only unpickler, and a short list of harmless classes beside tensors.
"""

import argparse
import json
import pathlib
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mimir_fast.checkpoints.reading import (
    WeightsError,
    read_meta,
    read_tensors,
    resolve_checkpoint,
    saved_tensors,
)
from mimir_fast.models.families import all_families, under_our_names
from mimir_fast.models.lora import merge_lora

WeightsChoice = Literal["auto", "model", "ema"]

NormalizationName = Literal["none", "half", "imagenet"]

# Subtracted from and divided out of images in [0, 1] inside the classifier, name: (mean, std). `none` is how our
# pre-training and the authors' feed the encoder.
NORMALIZATIONS: dict[NormalizationName, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}

# What a model of ours has beside encoder and decoder.
_BESIDE = ("head.weight", "head.bias", "fc_norm.", "mask_token")
_WRAPPERS = ("model", "model_state_dict", "state_dict", "model_ema")


@dataclass
class Weights:
    """Named tensors and what is known of them.

    Attributes:
        tensors: name → CPU tensor, without any wrapper's prefix.
        origin: what was read, for messages.
        config: the configuration saved with them (ours only).
        normalization: (mean, std) the weights were trained with, where the writer says so.
    """

    tensors: dict[str, Tensor]
    origin: str
    config: dict[str, Any] | None = None
    normalization: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    notes: list[str] = field(default_factory=list)


def read_weights(source: str | Path, which: WeightsChoice = "auto") -> Weights:
    """The weights in a folder, a file or timm's collection.

    Args:
        source: a run folder, checkpoint folder, .safetensors or .pth file, or `timm:NAME`.
        which: of our checkpoints, the trained weights (`model`), their moving average (`ema`), or the average where
            there is one (`auto`).
    Raises:
        WeightsError: missing, truncated, unsafe, or not a vision transformer's.
    """
    if str(source).startswith("timm:"):
        return _read_timm(str(source).removeprefix("timm:"))
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_checkpoint(resolve_checkpoint(path), which)
    if not path.is_file():
        raise WeightsError(
            f"{path} does not exist; wanted a run or checkpoint folder, a .safetensors or .pth file, or timm:NAME"
        )
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickled(path)


def strip_wrappers(content: Any, origin: str) -> dict[str, Tensor]:
    """The encoder's tensors out of nested dicts and prefixes such as `module.base_model.`.

    Raises:
        WeightsError: no vision transformer inside.
    """
    while isinstance(content, dict) and not any(isinstance(v, Tensor) for v in content.values()):
        inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), dict)), None)
        if inner is None:
            break
        content = inner
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, dict) else {}
    # Each family has a tensor of its own name, under whatever prefix; the shortest prefix is the whole model's.
    known = {family.anchor for family in all_families().values()}
    prefixes = {
        name.removesuffix(anchor)
        for name in tensors
        for anchor in known
        if name == anchor or name.endswith("." + anchor)
    }
    if not prefixes:
        some = ", ".join(list(tensors)[:4]) or "no tensors at all"
        raise WeightsError(
            f"{origin} holds no vision transformer: there is none of {', '.join(sorted(known))} in it (it has {some}). "
            "Wanted a checkpoint of mimir_fast, of the MIMIR authors, or a timm model of one of our families"
        )
    prefix = min(prefixes, key=len)
    inside = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    if prefix.endswith("encoder."):  # the state dict of a live model of ours, which shows its parts
        whole = prefix.removesuffix("encoder.")
        beside = {name.removeprefix(whole): t for name, t in tensors.items() if name.startswith(whole)}
        inside |= {n.removeprefix("decoder."): t for n, t in beside.items() if n.startswith(("decoder.", *_BESIDE))}
    return under_our_names(inside)


def _read_checkpoint(folder: Path, which: WeightsChoice) -> Weights:
    meta = read_meta(folder)
    has_ema = any(name.startswith("ema/") for name in saved_tensors(folder))
    if which == "ema" and not has_ema:
        raise WeightsError(f"{folder} holds no moving average: train with EMA on, or take weights=model")
    use_ema = has_ema and which != "model"
    # The average covers what was trained; fixed tensors are with the weights.
    tensors = read_tensors(folder, "model/") | (read_tensors(folder, "ema/") if use_ema else {})
    tensors = merge_lora(tensors, meta.get("config"))
    origin = f"{folder} ({'moving average' if use_ema else 'weights'} of step {meta.get('step', '?')})"
    return Weights(strip_wrappers(tensors, origin), origin, config=meta.get("config"))


def _read_safetensors(path: Path) -> Weights:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is no whole safetensors file ({error}): copy or download it again") from error
    config = json.loads(metadata["config"]) if metadata.get("format") == "mimir_fast" else None
    return Weights(strip_wrappers(tensors, str(path)), str(path), config=config)


def _read_pickled(path: Path) -> Weights:
    try:
        with torch.serialization.safe_globals(_harmless_globals()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} is not loaded: it wants to create objects other than tensors, or is no checkpoint, and unpickling "
            f"could run code of its author ({str(error).splitlines()[0]}). If you trust it, open it yourself and "
            "save its state dict with safetensors.torch.save_file"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise WeightsError(f"{path} is truncated or not a torch checkpoint ({str(error).splitlines()[0]})") from error
    return Weights(strip_wrappers(content, str(path)), str(path))


def _harmless_globals() -> list[Any]:
    """What checkpoints of the field carry beside tensors: argparse results, paths, numpy numbers."""
    harmless: list[Any] = [argparse.Namespace, pathlib.PosixPath, pathlib.Path]
    try:
        import numpy as np
    except ImportError:
        return harmless
    scalar = np.float64(0).__reduce__()[0]
    harmless += [(scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar"), np.dtype]
    return harmless + [type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4", "?")]


def _read_timm(name: str) -> Weights:
    import timm

    try:
        model: Any = timm.create_model(name, pretrained=True)
    except Exception as error:  # unknown name, no weights of that name, no network: timm and its hub raise many types
        raise WeightsError(
            f"timm:{name} cannot be had ({str(error).splitlines()[0] if str(error) else type(error).__name__}); "
            "list names with timm.list_pretrained('vit_*'), or give a downloaded .safetensors file"
        ) from error
    config = model.pretrained_cfg
    tensors = strip_wrappers({k: v.detach() for k, v in model.state_dict().items()}, f"timm:{name}")
    return Weights(tensors, f"timm:{name}", normalization=(tuple(config["mean"]), tuple(config["std"])))
