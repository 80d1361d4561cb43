"""Documents with a `text` column out of parquet and jsonl(.gz, .zst) files, one at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from opencoder.compressed import ERRORS as DAMAGE
from opencoder.compressed import open_decompressed
from opencoder.errors import DataError

JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst", ".ndjson")
OPTIONAL = ("id", "repo", "path", "source", "language")


class Document(NamedTuple):
    """One text to tokenise."""

    id: str
    """The `id` column, "" if there is none."""
    source: str
    """Where it came from: the columns `source`, `repo`, `path`, or the file's name."""
    language: str
    """The `language` column, "" if there is none."""
    text: str

    def identity(self) -> str:
        """The `id` column, or the SHA-256 of the text. Worked out on demand: hashing is a worker's job."""
        return self.id or hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()


def find_files(paths: Iterable[str | Path]) -> list[Path]:
    """The parquet and jsonl files named or lying in the folders named, sorted. Raises DataError if there are none."""
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found += sorted(p for p in path.rglob("*") if p.is_file() and _kind(p))
        elif path.is_file():
            if not _kind(path):
                raise DataError(f"{path} is neither parquet nor jsonl(.gz, .zst): convert it, or give another file")
            found.append(path)
        else:
            raise DataError(f"{path} does not exist")
    if not found:
        raise DataError(f"no parquet or jsonl file in {', '.join(map(str, paths))}")
    return found


def _kind(path: Path) -> str | None:
    if path.name.startswith("."):
        return None  # being written
    if path.suffix == ".parquet":
        return "parquet"
    return "jsonl" if path.name.endswith(JSONL) else None


def read_documents(path: Path, *, column: str = "text") -> Iterator[Document]:
    """The documents of one file, in order. Raises DataError naming the file and the row or line at fault."""
    rows = _parquet_rows(path, column) if _kind(path) == "parquet" else _json_rows(path, column)
    for row in rows:
        text = row[column]
        source = row.get("source") or row.get("repo") or row.get("path") or path.name
        yield Document(str(row.get("id") or ""), str(source), str(row.get("language") or ""), text)


def _parquet_rows(path: Path, column: str) -> Iterator[dict[str, Any]]:
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise DataError(f"{path} has no column `{column}`; it has {', '.join(names)}")
            wanted = [column, *(name for name in OPTIONAL if name in names)]
            for batch in file.iter_batches(batch_size=256, columns=wanted):
                for i, row in enumerate(batch.to_pylist()):
                    if not isinstance(row[column], str):
                        raise DataError(f"{path}: row {i} of a batch has no text in column `{column}`")
                    yield row
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is damaged or truncated: {error}") from error


def _json_rows(path: Path, column: str) -> Iterator[dict[str, Any]]:
    number = 0
    try:
        with open_decompressed(path) as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (json.JSONDecodeError, UnicodeDecodeError) as error:
                    raise DataError(f"{path}:{number} is not a JSON document: {error}") from error
                if not isinstance(row, dict) or not isinstance(row.get(column), str):
                    keys = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                    raise DataError(f"{path}:{number} has no text under `{column}`; it has {keys}")
                yield row
    except DAMAGE as error:
        raise DataError(f"{path} is damaged or truncated after line {number}: {error}") from error
