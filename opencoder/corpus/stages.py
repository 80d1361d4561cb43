"""The tasks of a build: each a pure function of its input files and the parameters that writes its output atomically.

A task whose output is there is not run again, so a killed build goes on. Shard k has work/read/k.parquet (records with
text), work/keys/k.npy (band keys), work/rules/k.parquet (hits), and at last one part each of clean/ and dropped/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from opencoder.config import CorpusConfig
from opencoder.files import atomic_open, atomic_path

from . import dedup, minhash, rules, signals
from .read import SCHEMA, Item, read_item, to_table

META = [name for name in SCHEMA.names if name != "text"]
CLEAN = [
    "id",
    "path",
    "source",
    "repo",
    "language",
    "doc_type",
    "text",
    "size_bytes",
    "licence",
    "stars",
    "commit_time",
]
DROPPED = ["id", "path", "language", "stage", "reason", "value", "threshold", "source", "size_bytes", "hits", "excerpt"]
FLUSH_BYTES = 16_000_000
"""Text held in memory before a row group is written."""
EXCERPT = 600
"""Characters of a dropped file that the report may show."""


def shard_path(work: Path, stage: str, number: int, suffix: str) -> Path:
    """Where a task's output lies."""
    return work / stage / f"{number:06d}.{suffix}"


def lsh_shape(config: CorpusConfig) -> tuple[int, int]:
    """(bands, rows) of the configured preset."""
    if config.dedup.preset == "custom":
        assert config.dedup.bands is not None
        assert config.dedup.rows is not None
        return config.dedup.bands, config.dedup.rows
    bands, rows, _ = dedup.PRESETS[config.dedup.preset]
    return bands, rows


def read_task(work: Path, number: int, items: list[Item], config: CorpusConfig) -> None:
    """Read the files of a shard."""
    target = shard_path(work, "read", number, "parquet")
    with atomic_path(target) as temporary, pq.ParquetWriter(temporary, SCHEMA, compression="zstd") as writer:
        records, size = [], 0
        for item in items:
            for record in read_item(item, config):
                records.append(record)
                size += len(record.text or "")
                if size >= FLUSH_BYTES:
                    writer.write_table(to_table(records))
                    records, size = [], 0
        writer.write_table(to_table(records))


def texts(work: Path, number: int, wanted: NDArray[np.bool_]) -> list[tuple[int, str]]:
    """(row, text) of the wanted rows of a shard."""
    column = pq.read_table(shard_path(work, "read", number, "parquet"), columns=["text"])["text"]
    return [(int(row), column[int(row)].as_py()) for row in np.flatnonzero(wanted)]


def keys_task(work: Path, number: int, wanted: NDArray[np.bool_], config: CorpusConfig) -> None:
    """Band keys of the wanted rows of a shard, in order."""
    bands, rows = lsh_shape(config)
    d = config.dedup
    chosen = [text for _, text in texts(work, number, wanted)]
    keys = np.zeros((len(chosen), bands), dtype=dedup.KEY)
    for start in range(0, len(chosen), 512):  # 512 signatures of 2048 slots are 4 MB
        part = chosen[start : start + 512]
        found = minhash.signatures(part, num_perm=bands * rows, ngram=d.ngram, scheme=d.scheme, seed=d.seed)
        keys[start : start + 512] = dedup.band_keys(found, bands, rows)
    with atomic_open(shard_path(work, "keys", number, "npy"), "wb") as file:
        np.save(file, keys)


def rules_task(work: Path, number: int, wanted: NDArray[np.bool_], config: CorpusConfig) -> None:
    """Hits of the wanted rows of a shard: columns row, hits (JSON), errors (JSON)."""
    meta = pq.read_table(shard_path(work, "read", number, "parquet"), columns=["size_bytes", "doc_type", "language"])
    out: dict[str, list[Any]] = {"row": [], "hits": [], "errors": []}
    for row, text in texts(work, number, wanted):
        size, doc_type, language = (meta[name][row].as_py() for name in meta.column_names)
        values, errors = signals.compute(text, size_bytes=size, doc_type=doc_type)
        hits = rules.judge(values, doc_type=doc_type, language=language)
        if hits or errors:
            out["row"].append(row)
            out["hits"].append(json.dumps([hit._asdict() for hit in hits]))
            out["errors"].append(json.dumps(errors))
    schema = pa.schema([("row", pa.int64()), ("hits", pa.string()), ("errors", pa.string())])
    with atomic_path(shard_path(work, "rules", number, "parquet")) as temporary:
        pq.write_table(pa.table(out, schema=schema), temporary)


def output_task(work: Path, number: int, verdicts: pa.Table) -> None:
    """The shard's parts of clean/ and dropped/. `verdicts` has a row per record: status, stage, reason, value,
    threshold, hits."""
    table = pq.read_table(shard_path(work, "read", number, "parquet"))
    for name in ("status", "stage", "reason", "value", "threshold"):
        table = table.set_column(table.schema.get_field_index(name), name, verdicts[name])
    text = table["text"]
    excerpts = [None if (t := text[i].as_py()) is None else t[:EXCERPT] for i in range(len(text))]
    table = table.append_column("hits", verdicts["hits"]).append_column("excerpt", pa.array(excerpts, pa.string()))
    for status, columns, stage in (
        ("kept", CLEAN, "clean"),
        ("dropped", DROPPED, "dropped"),
        ("failed", DROPPED, "failed"),
    ):
        rows = table.filter(pc.equal(table["status"], status)).select(columns)
        with atomic_path(shard_path(work, stage, number, "parquet")) as temporary:
            pq.write_table(rows, temporary, compression="zstd", row_group_size=1024)
