"""What the tasks share: the shards of records with text, and the table of all records.

A record is known by its row: its place in the shards, one after another."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

_STARTS = b"opencoder.starts"


def write_rows(path: Path, columns: dict[str, Any], schema: pa.Schema, starts: Sequence[int]) -> None:
    """A table of all records that knows where each shard begins; `starts` has one entry more than there are shards."""
    table = pa.table(columns, schema=schema.with_metadata({_STARTS: json.dumps(list(map(int, starts))).encode()}))
    pq.write_table(table, path, compression="zstd")


def starts_of(path: Path) -> list[int]:
    """Where each shard begins in a file of `write_rows`."""
    found: list[int] = json.loads(pq.read_schema(path).metadata[_STARTS])
    return found


def rows_of_shard(path: Path, shard: int, columns: list[str]) -> tuple[int, pa.Table]:
    """(first row, the shard's part) of a file of `write_rows`."""
    starts = starts_of(path)
    table = pq.read_table(path, columns=columns)
    return starts[shard], table.slice(starts[shard], starts[shard + 1] - starts[shard])


def text_column(path: Path) -> pa.ChunkedArray:
    """The texts of a shard."""
    return pq.read_table(path, columns=["text"])["text"]


class ShardTexts:
    """The texts of rows, wherever they lie; each call opens a shard once."""

    def __init__(self, files: Sequence[Path], starts: Sequence[int]) -> None:
        self.files, self.starts = files, np.asarray(starts, np.int64)

    def of(self, rows: NDArray[np.int64]) -> list[str]:
        """In the order of `rows`, which may come in any."""
        found: dict[int, str] = {}
        shards = np.searchsorted(self.starts, rows, "right") - 1
        for shard in np.unique(shards):
            mine = np.unique(rows[shards == shard])
            texts = text_column(self.files[shard]).take(pa.array(mine - self.starts[shard]))
            found.update(zip(mine.tolist(), texts.to_pylist(), strict=True))
        return [found[row] for row in rows.tolist()]
