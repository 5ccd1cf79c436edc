"""Files of weights, opened without ever running code from them.

What a file is shows in its first bytes, not in its name. Whatever cannot be read is a WeightsError with the reason in
one line and what to do. Tensors stay mapped from the file until they are copied into a model, so reading takes no
second copy of a large file.
"""

import argparse
import json
import os
import pathlib
import pickletools
import re
import types
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mimir_fast.checkpoints.dcp import read_dcp
from mimir_fast.checkpoints.reading import WeightsError

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin", "diffusion_pytorch_model.bin")
CONFIGS = ("config.json", "preprocessor_config.json", "processor_config.json")
ABOUT = "mimir_fast.json"  # beside a folder's tensors, what a safetensors file of ours has in its header
INDEX_SUFFIX = ".index.json"
AGAIN = "copy or download it again"

# First bytes → what such a file is, and what to do.
_FOREIGN: tuple[tuple[bytes, str], ...] = (
    (
        b"version https://git-lfs",
        "is a pointer of Git LFS, the weights are elsewhere: run `git lfs pull` in its folder",
    ),
    (b"<!DOCTYPE", f"is a web page, not a file of weights: {AGAIN} by its direct address"),
    (b"<html", f"is a web page, not a file of weights: {AGAIN} by its direct address"),
    (b"\x89HDF", "is an HDF5 file (Keras): convert it to PyTorch and save its state dict with safetensors"),
    (b"GGUF", "is a GGUF file: convert it to PyTorch and save its state dict with safetensors"),
    (b"\x1f\x8b", "is compressed by gzip: unpack it with `gunzip`"),
    (b"BZh", "is compressed by bzip2: unpack it with `bunzip2`"),
    (b"\xfd7zXZ", "is compressed by xz: unpack it with `unxz`"),
    (b"7z\xbc\xaf", "is a 7z archive: unpack it"),
    (b"\x93NUMPY", "is a NumPy array: wanted the named tensors of a whole model"),
)


class Opened(NamedTuple):
    """What is in a file, and what stands beside it.

    Attributes:
        content: dicts, lists, numbers and tensors, nested as the writer had them.
        metadata: strings in the header of a safetensors file.
        configs: name → content of the JSON files in the same folder that tell of a model, CONFIGS.
    """

    content: Any
    metadata: dict[str, str]
    configs: dict[str, dict[str, Any]]


def find_file(folder: Path) -> Path | None:
    """The weights in a folder as Hugging Face and timm lay it out, whole or the index of their parts; or None."""
    names = [*SINGLE_FILES[:1], SINGLE_FILES[0] + INDEX_SUFFIX, *SINGLE_FILES[1:], SINGLE_FILES[1] + INDEX_SUFFIX]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def open_folder(folder: Path) -> Opened:
    """What is in a folder of torch.distributed.checkpoint, and what our export wrote beside it.

    Raises:
        WeightsError: damaged, incomplete, or it wants to create objects other than tensors.
    """
    said = {key: text for key, text in _json_beside(folder / ABOUT).items() if isinstance(text, str)}
    configs = {name: found for name in CONFIGS if (found := _json_beside(folder / name))}
    return Opened(read_dcp(folder), said, configs)


def open_file(path: Path) -> Opened:
    """What is in a file of weights: torch.save's, safetensors, or the index of several of these.

    Raises:
        WeightsError: empty, cut, of another kind, or it wants to create objects other than tensors.
    """
    configs = {name: found for name in CONFIGS if (found := _json_beside(path.with_name(name)))}
    if path.name.endswith(INDEX_SUFFIX):
        return Opened(_read_shards(path), {}, configs)
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror or error})") from error
    if not start.strip(b"\0"):
        size = path.stat().st_size
        state = "is empty (0 bytes)" if size == 0 else f"begins with zeros only ({size} bytes in all), so it was cut"
        raise WeightsError(f"{path} {state}: {AGAIN}")
    if start.startswith(b"PK"):
        _check_zip(path)
        return Opened(_unpickle(path, mapped=True), {}, configs)
    if start[8:9] == b"{" and start[0:1] != b"{":
        return Opened(*_read_safetensors(path), configs)
    if start[257:262] == b"ustar":
        raise WeightsError(f"{path} is a tar archive: unpack it and give the file of weights inside")
    if start.startswith(b"\x80"):
        return Opened(_unpickle(path, mapped=False), {}, configs)
    words = next((words for magic, words in _FOREIGN if start.lower().startswith(magic.lower())), None)
    if words is None and start.lstrip()[:1] in (b"{", b"["):
        words = f"is JSON: give the file of weights, or its index, whose name ends in {INDEX_SUFFIX}"
    if words is None:
        words = (
            f"is no file of weights: it begins with {start[:8]!r}. Wanted what torch.save or safetensors writes; if it "
            f"should be one, {AGAIN}"
        )
    raise WeightsError(f"{path} {words}")


def _json_beside(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _read_shards(path: Path) -> dict[str, Any]:
    """All tensors that an index names, from its files."""
    try:
        places = json.loads(path.read_text())["weight_map"]
        files = sorted(set(places.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path} is no index of weights: it has no weight_map ({error}): {AGAIN}") from error
    found: dict[str, Any] = {}
    for name in files:
        # A name with folders in it could point anywhere.
        if not isinstance(name, str) or Path(name).name != name or name.endswith(INDEX_SUFFIX):
            raise WeightsError(f"{path} names {name!r}, wanted names of files beside it")
        if not (part := path.with_name(name)).is_file():
            raise WeightsError(f"{path} names {name}, which is not beside it: {AGAIN} with all its {len(files)} files")
        content = open_file(part).content
        if isinstance(content, dict):
            found |= content
    if missing := [name for name in places if name not in found]:
        raise WeightsError(
            f"{path}: {missing[0]} ({len(missing)} in all) should be in {places[missing[0]]} and is not: {AGAIN}"
        )
    return found


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise WeightsError(f"{path} is no whole safetensors file ({_first_line(error)}): {AGAIN}") from error


def _check_zip(path: Path) -> None:
    """Raises WeightsError for archives that are not torch.save's."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise WeightsError(f"{path} is truncated or damaged ({_first_line(error)}): {AGAIN}") from error
    if any("/code/" in name for name in names):
        raise WeightsError(
            f"{path} is a TorchScript program: evaluate takes it as it is (--checkpoint); to start training from it, "
            "save the state dict of the model it was made of"
        )
    if any(name.endswith(("data.pkl",)) for name in names):
        return
    if any(name.endswith(".npy") for name in names):
        words = "is a NumPy archive (JAX weights?): load it into a PyTorch model and save its state dict"
    elif any("archive_format" in name or name.endswith("serialized_exported_program.json") for name in names):
        words = "is a torch.export program: evaluate takes it, under a name that ends in .pt2"
    else:
        words = f"is a zip archive without data.pkl ({', '.join(names[:3]) or 'empty'}), so torch.save did not write it"
        words += ": unpack it if the weights are inside"
    raise WeightsError(f"{path} {words}")


def _unpickle(path: Path, *, mapped: bool) -> Any:
    try:
        with torch.serialization.safe_globals(_harmless_globals()):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # for damaged bytes the unpickler raises anything
        text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
        if wanted := _wanted_class(text, path, zipped=mapped):
            raise WeightsError(
                f"{path} is not loaded: it wants to create {wanted}, and unpickling objects other than tensors could "
                "run code of its author. If you trust it, open it yourself where that class is installed and save its "
                "state dict with safetensors.torch.save_file"
            ) from error
        raise WeightsError(
            f"{path} is truncated or not a torch checkpoint ({type(error).__name__}: {_first_line(text)}): {AGAIN}"
        ) from error


def _wanted_class(text: str, path: Path, *, zipped: bool) -> str:
    """The class that the weights-only unpickler refused, by its message or by the operations of the pickle."""
    if found := re.search(r"GLOBAL ([\w.]+)|(?:but got <class '|whose module )([\w.]+)", text):
        return found[1] or found[2]
    if zipped or "Unsupported operand" not in text:
        return ""
    words: list[str] = []
    try:
        for operation, argument, _ in pickletools.genops(path.read_bytes()):
            if operation.name == "STACK_GLOBAL" and len(words) > 1:
                return ".".join(words[-2:])
            if operation.name == "GLOBAL":
                return str(argument).replace(" ", ".")
            words += [argument] if isinstance(argument, str) else []
    except ValueError:  # cut
        return ""
    return ""


def _first_line(error: object) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def _harmless_globals() -> list[Any]:
    """What checkpoints of the field carry beside tensors: argparse results, paths, numpy numbers and arrays."""
    harmless: list[Any] = [argparse.Namespace, types.SimpleNamespace]
    for module in ("pathlib", "pathlib._local"):  # Python 3.13 names the second
        for name in ("Path", "PosixPath", "PurePath", "PurePosixPath"):
            harmless.append((getattr(pathlib, name), f"{module}.{name}"))
        for name in ("WindowsPath", "PureWindowsPath"):  # the former cannot be made elsewhere
            harmless.append((pathlib.PureWindowsPath, f"{module}.{name}"))
    try:
        import numpy as np
    except ImportError:
        return harmless
    scalar, rebuild = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        harmless += [(scalar, f"{module}.scalar"), (rebuild, f"{module}._reconstruct")]
    harmless += [np.dtype, np.ndarray]
    return harmless + [type(np.dtype(kind)) for kind in ("f8", "f4", "f2", "i8", "i4", "u4", "u8", "u1", "?")]


@contextmanager
def weights_only() -> Iterator[None]:
    """Whatever another package loads with torch.load in here is loaded without running code, whatever it asks for."""
    name, off = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
    before: dict[str, Any] = {key: os.environ.pop(key, None) for key in (name, off)}
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
        os.environ.update({key: value for key, value in before.items() if value is not None})
