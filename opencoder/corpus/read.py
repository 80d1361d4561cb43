"""Sources to records: folders, files, archives, repositories and containers of documents, without ever holding more of
one file than the size cap.

Every input ends as exactly one record per file or document: readable, dropped (with reason, value and threshold), or
failed (with reason). The forms are in opencoder/corpus/sources, described in docs/sources.md."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from opencoder.compressed import ERRORS as DAMAGE
from opencoder.corpus_config import CorpusConfig

from .sources import jsonl, parquet
from .sources.fields import check_names
from .sources.git import read_git
from .sources.items import Item, find_items, kind_of
from .sources.jsonl import read_jsonl
from .sources.parquet import read_parquet
from .sources.plain import read_file
from .sources.record import SCHEMA, Record, judge_bytes, to_table
from .sources.tar import read_tar
from .sources.zip import read_zip

__all__ = ["SCHEMA", "Item", "Record", "check_columns", "find_items", "judge_bytes", "kind_of", "read_item", "to_table"]

_READERS = {"jsonl": read_jsonl, "parquet": read_parquet, "tar": read_tar, "zip": read_zip, "git": read_git}


def read_item(item: Item, config: CorpusConfig) -> Iterator[Record]:
    """The record of a file, or those of the documents in a container."""
    if item.problem is not None:
        yield Record(item.path, item.source).fail(item.problem)
    elif (reader := _READERS.get(item.kind)) is not None:
        yield from reader(item, config)
    else:
        yield read_file(item, config)


def check_columns(item: Item) -> None:
    """Raise DataError if a parquet container, or the first line of a jsonl one, has no text column."""
    if item.part or item.kind not in ("jsonl", "parquet"):
        return
    try:
        names = parquet.first_columns(item) if item.kind == "parquet" else jsonl.first_columns(item)
    except (*DAMAGE, ValueError, pa.ArrowException):
        return  # damage is reported where it is met
    if names:
        check_names(item.file, names)
