"""Writing and reading files of rows, for the tests of decontamination."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import zstandard


def write(path: Path, rows: list[Any]) -> Path:
    """Rows, or lines as they are, to a jsonl file, compressed by its suffix."""
    data = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    if path.suffix == ".zst":
        data = zstandard.compress(data)
    path.write_bytes(data)
    return path


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a parquet or jsonl file."""
    if path.suffix == ".parquet":
        return list(pq.read_table(path).to_pylist())
    data = path.read_bytes()
    data = gzip.decompress(data) if path.suffix == ".gz" else data
    data = zstandard.ZstdDecompressor().stream_reader(data).read() if path.suffix == ".zst" else data
    return [json.loads(line) for line in data.splitlines()]
