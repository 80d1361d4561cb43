"""Indexed datasets in Megatron's format, byte for byte: PREFIX.bin holds token ids and nothing else, PREFIX.idx says
where each sequence and document begins.

.idx, little-endian: magic (9 bytes), u64 version 1, u8 type code, u64 sequences N, u64 length D of the document
array (documents + 1), then int32[N] lengths in tokens, int64[N] byte offsets in .bin, int64[D] document bounds in sequences."""

from __future__ import annotations

import hashlib
import os
import struct
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opencoder.errors import DataError
from opencoder.files import atomic_open, fsync_directory, temporary_name

from .mapping import map_bytes

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
CODES: dict[int, type[np.generic]] = {
    1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16,
}  # fmt: skip
UINT16_BELOW = 65_500
"""Vocabularies smaller than this are stored as uint16, others as int32 (the writer's rule in Megatron)."""


def token_dtype(vocab_size: int) -> type[np.generic]:
    """The stored type of ids below `vocab_size`."""
    return np.uint16 if vocab_size < UINT16_BELOW else np.int32


def index_bytes(dtype: type[np.generic], lengths: NDArray[np.int32], bounds: NDArray[np.int64]) -> list[bytes]:
    """The parts of an .idx file. lengths (N,) tokens per sequence, bounds (documents + 1,) from 0 to N."""
    code = next(code for code, kind in CODES.items() if kind is dtype)
    size = np.dtype(dtype).itemsize
    pointers = np.zeros(len(lengths), np.int64)
    np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
    header = HEADER.pack(MAGIC, 1, code, len(lengths), len(bounds))
    parts = (lengths.astype("<i4"), (pointers * size).astype("<i8"), bounds.astype("<i8"))
    return [header, *(part.tobytes() for part in parts)]


class IndexedWriter:
    """Writes PREFIX.bin and PREFIX.idx: `with IndexedWriter(prefix, dtype) as w: w.add_document(ids)`.

    Both appear under their names only when the block ends without an error, .idx last."""

    def __init__(self, prefix: str | Path, dtype: type[np.generic]) -> None:
        self.bin, self.idx = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        self.dtype = dtype
        self.bin.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(temporary_name(self.bin), "wb")  # noqa: SIM115  closed in finalise or __exit__
        self._lengths: list[NDArray[np.int32]] = []

    def add_document(self, ids: NDArray[np.generic] | list[int]) -> None:
        """Append one document as one sequence; an empty one is a document of length 0."""
        array = np.asarray(ids, dtype=self.dtype)
        self._file.write(array.tobytes())
        self._lengths.append(np.array([len(array)], np.int32))

    def add_part(self, data: Path, lengths: NDArray[np.int32]) -> None:
        """Append the ids in file `data`, documents of the given lengths, without reading them as a whole."""
        with open(data, "rb") as part:
            while block := part.read(16 << 20):
                self._file.write(block)
        self._lengths.append(lengths.astype(np.int32))

    def finalise(self) -> None:
        """Make both files durable and visible."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        lengths = np.concatenate(self._lengths) if self._lengths else np.zeros(0, np.int32)
        os.replace(temporary_name(self.bin), self.bin)
        fsync_directory(self.bin.parent)
        with atomic_open(self.idx, "wb") as file:
            file.writelines(index_bytes(self.dtype, lengths, np.arange(len(lengths) + 1, dtype=np.int64)))

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finalise()
        else:
            self._file.close()
            temporary_name(self.bin).unlink(missing_ok=True)


class IndexedDataset:
    """Memory-mapped reader. `len` is the number of sequences; `dataset[i]` all ids of sequence i.

    Raises DataError naming the first fault of header or sizes."""

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        index = self._read_index(Path(f"{prefix}.idx"))
        code, sequences, bounds = index
        self.dtype = CODES[code]
        raw = map_bytes(f"{prefix}.idx")
        at = HEADER.size
        self.sizes: NDArray[np.int32] = np.frombuffer(raw, "<i4", sequences, at)
        """(N,) tokens per sequence."""
        self.pointers: NDArray[np.int64] = np.frombuffer(raw, "<i8", sequences, at + 4 * sequences)
        """(N,) byte offsets in .bin."""
        self.document_indices: NDArray[np.int64] = np.frombuffer(raw, "<i8", bounds, at + 12 * sequences)
        """(documents + 1,) bounds in sequences."""
        self._check()
        self._item_bytes = np.dtype(self.dtype).itemsize
        self.tokens: NDArray[Any] = map_bytes(f"{prefix}.bin").view(self.dtype)
        """(tokens,) all ids, as .bin holds them."""

    def __reduce__(self) -> tuple[type[IndexedDataset], tuple[str]]:
        """Loader workers that are not forked open the files anew: the arrays would be copied."""
        return IndexedDataset, (self.prefix,)

    def _read_index(self, path: Path) -> tuple[int, int, int]:
        if not path.is_file():
            raise DataError(f"{path} does not exist: give PREFIX without .idx, as made by `opencoder preprocess`")
        with open(path, "rb") as file:
            header = file.read(HEADER.size)
        if header[: len(MAGIC)] != MAGIC:
            raise DataError(f"{path} has a bad magic number: it is no indexed dataset, or its beginning is damaged")
        if len(header) < HEADER.size:
            raise DataError(f"{path} is truncated: {len(header)} bytes, the header alone has {HEADER.size}")
        _, version, code, sequences, bounds = HEADER.unpack(header)
        if version != 1:
            raise DataError(f"{path} has version {version}; this reader knows version 1")
        if code not in CODES:
            raise DataError(f"{path} has type code {code}; known: {sorted(CODES)}")
        expected = HEADER.size + 12 * sequences + 8 * bounds
        actual = path.stat().st_size
        if actual != expected:
            raise DataError(
                f"{path} has the wrong size: {actual} bytes, its header asks for {expected} (truncated copy?)"
            )
        return code, sequences, bounds

    def _check(self) -> None:
        """What is quick enough to check on every opening; verify.py does the rest."""
        bounds, data = self.document_indices, Path(f"{self.prefix}.bin")
        if len(bounds) == 0 or bounds[0] != 0 or bounds[-1] != len(self.sizes) or (np.diff(bounds) < 0).any():
            raise DataError(f"{self.prefix}.idx: document bounds must rise from 0 to the {len(self.sizes)} sequences")
        if not data.is_file():
            raise DataError(f"{data} does not exist beside {self.prefix}.idx: copy it there")
        size = np.dtype(self.dtype).itemsize
        expected = int(self.pointers[-1]) + int(self.sizes[-1]) * size if len(self.sizes) else 0
        actual = data.stat().st_size
        if actual != expected:
            raise DataError(
                f"{data} has {actual} bytes, its index asks for {expected}: it is truncated or another file"
            )

    def __len__(self) -> int:
        return len(self.sizes)

    @cached_property
    def lengths_hash(self) -> str:
        """Hex SHA-256 of the lengths: what the sample index depends on."""
        return hashlib.sha256(self.sizes.data).hexdigest()

    def __getitem__(self, i: int) -> NDArray[np.generic]:
        return self.get(i)

    def get(self, i: int, offset: int = 0, length: int | None = None) -> NDArray[np.generic]:
        """`length` ids of sequence i from `offset` on (default: to its end), without copying."""
        size = self.sizes.item(i)  # `item` gives a Python int, the quickest to reckon with
        end = size if length is None else offset + length
        if not 0 <= offset <= end <= size:
            raise IndexError(f"{self.prefix}: [{offset}, {end}) of sequence {i}, which has {size} tokens")
        start = self.pointers.item(i) // self._item_bytes
        return self.tokens[start + offset : start + end]
