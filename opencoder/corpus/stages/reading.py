"""Task `read`: the files of a shard to records."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from opencoder.corpus_config import CorpusConfig

from .. import dedup
from ..read import SCHEMA, Item, Record, read_item, to_table
from .licences import repository_key

META = [name for name in SCHEMA.names if name != "text"]
FLUSH_BYTES = 2_000_000
"""Text held in memory before a row group is written. A near-duplicate's kept file is read with its row group."""
FLUSH_RECORDS = 10_000
"""The same for records, most of which may be without text."""


def read(inputs: list[Path], outputs: list[Path], *, items: list[dict[str, Any]], config: dict[str, Any]) -> None:
    """Outputs: records with text, the same without, and what task `licences` needs, in JSON. Memory: one file or document of
    at most `max_bytes`, FLUSH_BYTES of text and FLUSH_RECORDS records."""
    settings = CorpusConfig.model_validate(config)
    licences: list[tuple[str, str, str]] = []
    repositories: set[str] = set()
    schema = SCHEMA.remove(SCHEMA.get_field_index("text"))
    with (
        pq.ParquetWriter(outputs[0], SCHEMA, compression="zstd", write_page_checksum=True) as texts,
        pq.ParquetWriter(outputs[1], schema, compression="zstd") as meta,
    ):
        records: list[Record] = []
        size = 0

        def flush() -> None:
            table = to_table(records)
            texts.write_table(table)
            meta.write_table(table.select(META))
            records.clear()

        for item in items:
            for record in read_item(Item(**item), settings):
                key = repository_key(record.source, record.repo)
                repositories.add(key)
                if record.licence_text is not None:
                    licences.append((key, record.path, record.licence_text))
                for unit in _units(record, settings):
                    records.append(unit)
                    size += len(unit.text or "")
                    if size >= FLUSH_BYTES or len(records) >= FLUSH_RECORDS:
                        flush()
                        size = 0
        flush()
    outputs[2].write_text(json.dumps({"files": licences, "repositories": sorted(repositories)}), encoding="utf-8")


def _units(record: Record, config: CorpusConfig) -> Iterator[Record]:
    """The record, or its chunks where those are the documents."""
    if record.text is None or config.dedup.level != "chunk":
        yield record
        return
    for number, text in enumerate(dedup.chunks(record.text, config.dedup.chunk_tokens)):
        data = text.encode("utf-8", "surrogatepass")
        yield replace(
            record, text=text, path=dedup.chunk_name(record.path, number), id=hashlib.sha256(data).hexdigest(),
            size_bytes=len(data),
        )  # fmt: skip
