"""Documents in parquet files, a row group at a time, so that a damaged one costs no other."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from opencoder.corpus_config import CorpusConfig

from .fields import COLUMNS, documents
from .items import Item
from .limits import RATIO_FROM
from .opening import open_binary
from .record import Record, what

BATCH_BYTES = 16 << 20
"""Text in memory at a time, by the average of the row group."""
BATCH_ROWS = 256
"""And rows at most."""
DAMAGE = (pa.ArrowException, OSError, EOFError, ValueError)


def read_parquet(item: Item, config: CorpusConfig) -> Iterator[Record]:
    """A record for each document of the item's part (its share of the row groups). A row group that fails its checksum
    or cannot be decoded gives the rows before the damage and one failure that names it."""
    whole = Record(item.path, item.source)
    try:
        opened = open_binary(item.file)
    except OSError as error:
        yield whole.fail(f"cannot be read: {what(error)}")
        return
    with opened:
        try:
            file = pq.ParquetFile(opened, page_checksum_verification=True, pre_buffer=False, buffer_size=1 << 20)
        except DAMAGE as error:
            yield whole.fail(f"damaged or truncated: {what(error)}")
            return
        with file:
            if (refusal := _refusal(file, opened.seek(0, 2), config)) is not None:
                yield whole.fail(refusal)
                return
            columns = [name for name in file.schema_arrow.names if name in COLUMNS]
            groups = file.num_row_groups
            starts = [0]
            for group in range(groups):
                starts.append(starts[-1] + file.metadata.row_group(group).num_rows)
            for group in range(groups * item.part // item.parts, groups * (item.part + 1) // item.parts):
                yield from _group(item, file, group, starts[group], columns, config)


def first_columns(item: Item) -> list[str]:
    """The names of the columns."""
    with open_binary(item.file) as file:
        names: list[str] = pq.read_schema(file).names
    return names


def _group(
    item: Item, file: pq.ParquetFile, group: int, start: int, columns: list[str], config: CorpusConfig
) -> Iterator[Record]:
    number = start
    facts = file.metadata.row_group(group)
    failure = Record(f"{item.path}:row-group-{group}", item.source)
    rows_at_once = max(1, min(BATCH_ROWS, BATCH_BYTES * facts.num_rows // max(1, facts.total_byte_size)))
    batches = file.iter_batches(batch_size=rows_at_once, row_groups=[group], columns=columns, use_threads=False)
    while True:
        try:
            rows = next(batches).to_pylist()
        except StopIteration:
            break
        except DAMAGE as error:
            left = start + facts.num_rows - number
            yield failure.fail(
                f"row group {group}: {left:,} of its {facts.num_rows:,} rows cannot be read: {what(error)}"
            )
            return
        for row in rows:
            yield from documents(item, f"{item.path}:{number}", row, config)
            number += 1
    if number != start + facts.num_rows:
        yield failure.fail(f"row group {group}: {number - start:,} rows instead of {facts.num_rows:,}")


def _refusal(file: pq.ParquetFile, size: int, config: CorpusConfig) -> str | None:
    """Why a file is not unpacked, if so: it states sizes like those of a bomb.

    The sizes of single columns are not looked at: pyarrow ends the process when it is asked for those of a column whose
    statistics are damaged."""
    unpacked = sum(file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups))
    most = config.read.archive.max_ratio
    if unpacked > RATIO_FROM and unpacked > most * size:
        return f"it states {unpacked:,} bytes in {size:,} packed ones, more than {most:g} to 1 (read.archive.max_ratio)"
    return None
