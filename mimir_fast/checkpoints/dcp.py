"""Folders of PyTorch's own checkpoint format, as torchtitan and torch.distributed.checkpoint.save write them.

Its list of tensors, `.metadata`, is a pickle, which torch's reader would run whatever it holds. Here it may create what
such a list consists of and nothing else. Shapes, dtypes and layouts are the writer's.
"""

import importlib
import pickle
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from mimir_fast.checkpoints.durable import sync
from mimir_fast.checkpoints.reading import WeightsError, root_cause

LIST = ".metadata"
_OPTIMIZER = ("optimizer.", "optim.")

# Where it was written stands in the list: words of a path, which open nothing.
_PATHS = {"Path", "PosixPath", "PurePath", "PurePosixPath", "WindowsPath", "PureWindowsPath"}
_PACKAGE = "torch.distributed.checkpoint"
_HARMLESS = {
    f"{_PACKAGE}.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    f"{_PACKAGE}.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch._utils": {"_get_layout"},
    "collections": {"OrderedDict"},
    "builtins": {"set"},
}  # fmt: skip


def is_dcp(folder: Path) -> bool:
    """True for a folder with a list of tensors, or with their files, of which a copy may have left out the list."""
    return (folder / LIST).is_file() or any(folder.glob("*.distcp"))


def read_dcp(folder: Path) -> dict[str, Tensor]:
    """Whole CPU tensors by their full names, but for what an optimiser keeps; no code from the files is run.

    Raises:
        WeightsError: damaged, incomplete, or it wants to create objects other than tensors.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

    listed = _read_list(folder)

    class Reader(dcp.FileSystemReader):
        """torch's own, with a list that was read before."""

        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            listed.storage_meta = getattr(listed, "storage_meta", None) or StorageMeta()
            return listed

    try:
        described = listed.state_dict_metadata.items()
        names = {str(info.relative_path) for info in listed.storage_data.values()}
        found = {
            name: torch.empty(info.size, dtype=info.properties.dtype)
            for name, info in described
            if isinstance(info, TensorStorageMetadata) and not name.startswith(_OPTIMIZER)
        }
    except (AttributeError, TypeError, RuntimeError) as error:
        raise WeightsError(f"{folder / LIST} is no list of tensors ({error}): copy the folder again") from error
    if outside := [name for name in names if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]:
        raise WeightsError(f"{folder / LIST} names {outside[0]!r}, wanted names of files in its folder")
    try:
        dcp.load(found, storage_reader=Reader(str(folder)), no_dist=True)
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        raise WeightsError(f"{folder} cannot be read ({root_cause(error)}): copy the whole folder again") from error
    return found


def write_dcp(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write named CPU tensors into a folder, made if need be.

    Raises:
        OSError: it cannot be written.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(str(folder)), no_dist=True)
    except CheckpointException as error:  # no Exception
        raise OSError(f"could not write {folder}: {root_cause(error)}") from error
    sync(folder)


def _read_list(folder: Path) -> Any:
    try:
        with (folder / LIST).open("rb") as file:
            return _Unpickler(file).load()
    except FileNotFoundError as error:
        raise WeightsError(
            f"{folder} has no {LIST}, the list of its tensors: copy the whole folder again, hidden files too"
        ) from error
    except WeightsError as error:
        raise WeightsError(f"{folder / LIST} is not loaded: {error}") from error
    except Exception as error:  # for damaged bytes an unpickler raises anything
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        raise WeightsError(f"{folder / LIST} is truncated or damaged ({text}): copy the folder again") from error


class _Unpickler(pickle.Unpickler):
    """Creates what a list of tensors consists of."""

    def find_class(self, module: str, name: str) -> Any:
        """The class; raises WeightsError for all others."""
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module in ("pathlib", "pathlib._local") and name in _PATHS:
            return PurePosixPath
        if name not in _HARMLESS.get(module, ()):
            raise WeightsError(
                f"it wants to create {module}.{name}, and unpickling objects other than tensors could run code of its "
                "author. If you trust it, load it with torch.distributed.checkpoint and save the state dict with "
                "safetensors.torch.save_file"
            )
        return getattr(importlib.import_module(module), name)
