"""Files seen as arrays, without reading them: plain ndarrays, whose slices cost a tenth of np.memmap's."""

from __future__ import annotations

import errno
import math
import mmap
import resource
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opencoder.errors import DataError


def map_bytes(path: str | Path) -> NDArray[np.uint8]:
    """(bytes,) the file's content, read-only, mapped for as long as the array or a view of it lives.

    A mapping keeps a file descriptor (until Python 3.13), and a blend of hundreds of datasets has several each: where the
    soft limit of open files is reached it is raised to the hard one. Raises DataError if that is not enough."""
    try:
        return _map(path)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        return _map(path)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        raise DataError(
            f"{path}: no more files can be opened than {hard} (soft limit {soft}): raise the hard limit with `ulimit -Hn`, "
            "or name fewer datasets in data.blend"
        ) from error


def _map(path: str | Path) -> NDArray[np.uint8]:
    with open(path, "rb") as file:
        if file.seek(0, 2) == 0:
            return np.zeros(0, np.uint8)  # an empty file cannot be mapped
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def map_npy(path: str | Path) -> NDArray[Any]:
    """The array in a .npy file (version 1.0, C order), mapped. Raises ValueError if the file is no such, or not whole."""
    with open(path, "rb") as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"{path} is not .npy version 1.0")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        offset = file.tell()
    raw = map_bytes(path)
    expected = offset + math.prod(shape) * dtype.itemsize
    if fortran or len(raw) != expected:
        raise ValueError(f"{path} has {len(raw)} bytes, its header asks for {expected}: it is truncated")
    array: NDArray[Any] = raw[offset:].view(dtype).reshape(shape)
    return array
