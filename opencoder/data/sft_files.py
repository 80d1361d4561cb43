"""Tokenised conversations: an indexed dataset with a conversation per sequence, and beside it PREFIX.mask, one byte per token of
PREFIX.bin: 1 where the token is a target, 0 where it is only read."""

from __future__ import annotations

import hashlib
import os
from functools import cached_property
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from opencoder.errors import DataError
from opencoder.files import temporary_name

from .indexed import IDENTITY_BLOCKS, IDENTITY_TOKENS, IndexedDataset, IndexedWriter
from .mapping import map_bytes


def mask_path(prefix: str | Path) -> Path:
    """PREFIX.mask"""
    return Path(f"{prefix}.mask")


class SftWriter:
    """Writes PREFIX.bin, .idx and .mask: `with SftWriter(prefix, dtype) as w: w.add(ids, learned)`.

    They appear under their names only when the block ends without an error, .idx last."""

    def __init__(self, prefix: str | Path, dtype: type[np.generic]) -> None:
        self.mask = mask_path(prefix)
        self._writer = IndexedWriter(prefix, dtype)
        self._file = open(temporary_name(self.mask), "wb")  # noqa: SIM115  closed in __exit__

    def add(self, ids: NDArray[np.generic] | list[int], learned: NDArray[np.bool_] | list[bool]) -> None:
        """Append a conversation of n tokens: ids (n,), learned (n,)."""
        mask = np.asarray(learned, np.uint8)
        assert len(mask) == len(ids), (len(mask), len(ids))
        self._writer.add_document(ids)
        self._file.write(mask.tobytes())

    def __enter__(self) -> SftWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()
        if kind is None:
            os.replace(temporary_name(self.mask), self.mask)
        else:
            temporary_name(self.mask).unlink(missing_ok=True)
        self._writer.__exit__(kind, error, trace)


class SftData:
    """Memory-mapped conversations. Raises DataError for a missing or damaged file."""

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self.indexed = IndexedDataset(prefix)
        path = mask_path(prefix)
        if not path.is_file():
            raise DataError(
                f"{path} does not exist: data.kind=sft needs a dataset of `opencoder preprocess-sft`, with its loss mask"
            )
        if path.stat().st_size != len(self.indexed.tokens):
            raise DataError(
                f"{path} has {path.stat().st_size} bytes, {prefix}.bin holds {len(self.indexed.tokens)} tokens: one of them is "
                "truncated or of another dataset"
            )
        self.mask: NDArray[np.uint8] = map_bytes(path)
        """(tokens,) 1: a target."""

    def __reduce__(self) -> tuple[type[SftData], tuple[str]]:
        return SftData, (self.prefix,)

    def __len__(self) -> int:
        return len(self.indexed)

    @property
    def positions(self) -> NDArray[np.int32]:
        """(conversations,) places each takes in a row: its tokens but the last, which is a label alone."""
        found: NDArray[np.int32] = self.indexed.sizes - np.int32(1)
        return found

    @cached_property
    def identity(self) -> str:
        """As `IndexedDataset.identity`, with pieces of the mask."""
        found = hashlib.sha256(self.indexed.identity.encode())
        last = max(len(self.mask) - IDENTITY_TOKENS, 0)
        for block in range(IDENTITY_BLOCKS):
            start = last * block // (IDENTITY_BLOCKS - 1)
            found.update(self.mask[start : start + IDENTITY_TOKENS].tobytes())
        return found.hexdigest()

    def conversation(self, i: int) -> tuple[NDArray[np.generic], NDArray[np.uint8]]:
        """ids (n,) and mask (n,) of conversation i."""
        ids = self.indexed.get(i)
        start = self.indexed.pointers.item(i) // np.dtype(self.indexed.dtype).itemsize
        return ids, self.mask[start : start + len(ids)]
