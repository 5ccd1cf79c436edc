"""Arrays of uncompressed npz files, mapped from where they lie in the file: nothing is read until it is looked at."""

import struct
import zipfile
from pathlib import Path
from typing import Literal

import numpy as np

_LOCAL_HEADER_BYTES = 30


class MissingArrayError(ValueError):
    """An npz lacks an array; the message lists those it has."""


def map_member(path: Path, name: str) -> np.ndarray:
    """The array `name` of an uncompressed npz as a read-only memory map.

    A file that claims more than it holds is refused before memory is asked for: nothing is decompressed, and the
    array must lie inside the file.
    Raises:
        MissingArrayError: there is no such array.
        ValueError: not an npz, compressed, cut short, or claiming more than it holds.
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            names = [member.removesuffix(".npy") for member in archive.namelist()]
            if name not in names:
                raise MissingArrayError(f"{path} has no array {name!r}; it has {', '.join(sorted(names)) or 'none'}")
            member = archive.getinfo(f"{name}.npy")
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{path}: {name!r} is compressed and cannot be mapped; save it again with np.savez")
            # The central directory says where the member's own header starts; the data follow its two variable fields.
            file.seek(member.header_offset)
            name_bytes, extra_bytes = struct.unpack("<26xHH", file.read(_LOCAL_HEADER_BYTES))
            file.seek(member.header_offset + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes)
            version = np.lib.format.read_magic(file)
            read_header = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            shape, fortran_order, dtype = read_header(file)
            if dtype.hasobject:
                raise ValueError(f"{path}: {name!r} holds Python objects, expected numbers")
            claimed, there = int(np.prod(shape, dtype=object)) * dtype.itemsize, path.stat().st_size - file.tell()
            if not 0 <= claimed <= there:
                raise ValueError(f"{path}: {name!r} claims {claimed} bytes but {there} are there; fetch it again")
            if claimed == 0:
                return np.empty(shape, dtype)
            order: Literal["C", "F"] = "F" if fortran_order else "C"
            return np.memmap(path, dtype=dtype, mode="r", offset=file.tell(), shape=shape, order=order)
    except (zipfile.BadZipFile, struct.error) as error:
        raise ValueError(f"{path} is not a whole npz file ({error}); fetch it again") from error
