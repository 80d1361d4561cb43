"""Every check of an indexed dataset, the slow ones included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from opencoder.console import ProgressBar
from opencoder.errors import DataError, VerificationError

from .indexed import IndexedDataset
from .sft_files import SftData, mask_path

BLOCK_TOKENS = 1 << 24


def verify_dataset(prefix: str | Path) -> dict[str, Any]:
    """Check PREFIX.bin/.idx and what lies beside them; returns counts. Raises VerificationError with the first fault."""
    try:
        data = IndexedDataset(prefix)
    except DataError as error:
        raise VerificationError(str(error)) from error
    size = np.dtype(data.dtype).itemsize
    if (data.sizes < 0).any():
        raise VerificationError(f"{prefix}.idx: sequence {int(np.argmax(data.sizes < 0))} has a negative length")
    expected = np.zeros(len(data), np.int64)
    np.cumsum(data.sizes[:-1], dtype=np.int64, out=expected[1:])
    wrong = np.flatnonzero(data.pointers != expected * size)
    if len(wrong):
        i = int(wrong[0])
        raise VerificationError(
            f"{prefix}.idx: sequence {i} points to byte {int(data.pointers[i])}, the lengths before it give {int(expected[i]) * size}"
        )
    described = Path(f"{prefix}.json")
    facts = json.loads(described.read_text(encoding="utf-8")) if described.is_file() else {}
    tokens = int(data.sizes.sum(dtype=np.int64))
    largest = _check_ids(data, prefix, facts.get("vocab_size"))
    documents = len(data.document_indices) - 1
    for name, found in (("tokens", tokens), ("documents", documents)):
        if name in facts and facts[name] != found:
            raise VerificationError(f"{described} says {facts[name]} {name}, the dataset has {found}")
    if facts.get("kind") == "sft" or mask_path(prefix).exists():
        _check_mask(prefix)
    rows = Path(f"{prefix}.docs.parquet")
    if rows.is_file() and (n := pq.ParquetFile(rows).metadata.num_rows) != documents:
        raise VerificationError(f"{rows} describes {n} documents, the dataset has {documents}")
    return {
        "documents": documents,
        "sequences": len(data),
        "tokens": tokens,
        "largest_id": largest,
        "dtype": np.dtype(data.dtype).name,
    }


def _check_mask(prefix: str | Path) -> None:
    """The loss mask of conversations: as long as the dataset, of zeros and ones; every conversation long enough for a target."""
    try:
        data = SftData(prefix)
    except DataError as error:
        raise VerificationError(str(error)) from error
    for begin in range(0, len(data.mask), BLOCK_TOKENS):
        block = data.mask[begin : begin + BLOCK_TOKENS]
        if block.max() > 1:
            at = int(np.argmax(block > 1))
            raise VerificationError(f"{prefix}.mask: byte {begin + at} is {int(block[at])}; allowed are 0 and 1")
    short = np.flatnonzero(data.indexed.sizes < 2)
    if len(short):
        raise VerificationError(f"{prefix}: conversation {int(short[0])} has fewer than 2 tokens, so nothing to learn")


def _check_ids(data: IndexedDataset, prefix: str | Path, vocab_size: int | None) -> int:
    """Largest id; every id must be at least 0 and below the vocabulary size, if that is known."""
    largest, done = -1, 0
    with ProgressBar("verify", total=len(data.tokens), unit="tokens") as bar:
        while done < len(data.tokens):
            block = data.tokens[done : done + BLOCK_TOKENS]
            low, high = int(block.min()), int(block.max())
            if low < 0 or (vocab_size is not None and high >= vocab_size):
                at = int(np.argmax((block < 0) | (block >= (vocab_size or np.iinfo(np.int64).max))))
                raise VerificationError(
                    f"{prefix}.bin: token {done + at} is {int(block[at])}, beyond the vocabulary of {vocab_size}"
                )
            largest, done = max(largest, high), done + len(block)
            bar.advance(len(block))
    return largest
