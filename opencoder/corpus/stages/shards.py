"""What the tasks share: the tables that say what becomes of a shard's records, and texts wherever they lie.

A record is known by its place in its shard, or by its row: its place in all shards, one after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

COPIES = pa.schema([("place", pa.int64()), ("kept_id", pa.string()), ("kept_path", pa.string())])
"""One row per record of a shard that is dropped as a copy of another file, ascending."""
NEAR = pa.schema(
    [*COPIES, ("kept_file", pa.string()), ("kept_place", pa.int64()), ("jaccard", pa.float64()), ("excerpt", pa.string()),
     ("kept_excerpt", pa.string())]
)  # fmt: skip
"""The same for near-duplicates. kept_file, kept_place: where the text of the kept file lies: a file beside the shard's, or an
absolute path. jaccard and, for some, excerpts are there where repositories were compared; else the reader works them out."""


def write_by_shard(
    paths: Sequence[Path],
    rows: NDArray[np.int64],
    columns: dict[str, Any],
    schema: pa.Schema,
    starts: NDArray[np.int64],
) -> None:
    """A table per shard. rows: ascending; columns: all but place; starts: the first row of each shard, and the end."""
    table = pa.table({"place": pa.array(rows, pa.int64()), **columns}, schema=schema)
    bounds = np.searchsorted(rows, starts)
    for n, path in enumerate(paths):
        begin, end = int(bounds[n]), int(bounds[n + 1])
        places = pa.array(rows[begin:end] - starts[n], pa.int64())
        part = table.slice(begin, end - begin).set_column(0, schema.field("place"), places)
        pq.write_table(part, path, compression="zstd")


def texts_at(path: Path, places: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], list[str]]]:
    """The texts of ascending places of a file of records, as (indices into places, texts), a row group at a time: only
    those that hold some are read, and their checksums verified where the file has them."""
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        groups = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
        starts = np.cumsum([0, *groups])
        bounds = np.searchsorted(places, starts)
        for g in np.flatnonzero(bounds[1:] > bounds[:-1]):
            here = np.arange(bounds[g], bounds[g + 1])
            column = file.read_row_group(g, columns=["text"])["text"]
            yield here, column.take(pa.array(places[here] - starts[g])).to_pylist()


def row_groups(path: Path) -> Iterator[tuple[int, pa.Table]]:
    """(place of the first row, rows) of a file of records, a row group at a time, so that a shard may be of any size."""
    place = 0
    with pq.ParquetFile(path) as file:
        for g in range(file.num_row_groups):
            table = file.read_row_group(g)
            yield place, table
            place += len(table)


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
            for which, texts in texts_at(self.files[shard], mine - self.starts[shard]):
                found.update(zip(mine[which].tolist(), texts, strict=True))
        return [found[row] for row in rows.tolist()]
