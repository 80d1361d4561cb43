"""Sources to records: folders, single files, and containers of documents (jsonl, parquet), without ever holding more of
one file than the size cap.

Every input ends as exactly one record per file or document: readable, dropped (with reason, value and threshold), or
failed (with reason)."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from opencoder.compressed import ERRORS as DAMAGE
from opencoder.compressed import open_decompressed
from opencoder.config import CorpusConfig
from opencoder.errors import DataError

from .language import EXCLUDED, UNKNOWN, detect

CONTAINERS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
TEXT_COLUMNS = ("text", "content")
PATH_COLUMNS = ("path", "max_stars_repo_path", "sub_path", "file_name")
REPO_COLUMNS = ("repo", "repo_name", "max_stars_repo_name")
STARS_COLUMNS = ("stars", "max_stars_count", "star_events_count")
LICENCE_COLUMNS = ("licence", "license", "licenses", "detected_licenses")
BLOCK = 1 << 20
LINE_FACTOR = 6
"""A JSON line may be this many times longer than its text (\\u escapes) before it is taken for too large."""

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("path", pa.string()),
        ("source", pa.string()),
        ("repo", pa.string()),
        ("language", pa.string()),
        ("doc_type", pa.string()),
        ("size_bytes", pa.int64()),
        ("stars", pa.int64()),
        ("commit_time", pa.int64()),
        ("licence", pa.string()),
        ("status", pa.string()),
        ("stage", pa.string()),
        ("reason", pa.string()),
        ("value", pa.float64()),
        ("threshold", pa.string()),
        ("text", pa.large_string()),
    ]
)


@dataclass
class Record:
    """One file or document on its way; `status` is kept, dropped or failed."""

    path: str
    source: str
    id: str | None = None
    repo: str | None = None
    language: str | None = None
    doc_type: str | None = None
    size_bytes: int = 0
    stars: int | None = None
    commit_time: int | None = None
    licence: str | None = None
    status: str = "kept"
    stage: str | None = None
    reason: str | None = None
    value: float | None = None
    threshold: str | None = None
    text: str | None = None

    def drop(self, stage: str, reason: str, value: float | None = None, threshold: str | None = None) -> Record:
        """Mark as dropped; the text is let go."""
        self.status, self.stage, self.reason, self.value, self.threshold = "dropped", stage, reason, value, threshold
        self.text = None
        return self

    def fail(self, reason: str) -> Record:
        """Mark as failed: it could not be read."""
        self.status, self.stage, self.reason, self.text = "failed", "read", reason, None
        return self


@dataclass(frozen=True)
class Item:
    """One file to read."""

    file: str
    path: str
    """Relative to its input, or the file's name."""
    source: str
    """Name of the input."""
    container: bool
    size: int
    mtime_ns: int


def find_items(inputs: list[str], config: CorpusConfig) -> list[Item]:
    """Every file of the inputs, sorted by source and path. Raises DataError for an input that does not exist.

    Symbolic links to folders are not followed, so no loop can arise."""
    items: list[Item] = []
    for name in sorted(set(inputs)):
        root = Path(name)
        if root.is_dir():
            source = root.resolve().name
            for folder, folders, files in os.walk(root):
                folders.sort()
                for file in sorted(files):
                    full = os.path.join(folder, file)
                    container = config.read.containers and file.endswith(CONTAINERS)
                    items.append(_item(full, os.path.relpath(full, root), source, container))
        elif os.path.lexists(root):
            items.append(_item(str(root), root.name, root.name, root.name.endswith(CONTAINERS)))
        else:
            raise DataError(f"--input {name} does not exist")
    return sorted(items, key=lambda item: (item.source, item.path, item.file))


def _item(file: str, path: str, source: str, container: bool) -> Item:
    try:
        status = os.stat(file)
        size, mtime = status.st_size, status.st_mtime_ns
    except OSError:  # a broken link or a loop of links: reading it will say so
        size, mtime = 0, 0
    return Item(file, path.replace(os.sep, "/"), source, container, size, mtime)


def read_item(item: Item, config: CorpusConfig) -> Iterator[Record]:
    """The record of a file, or those of the documents in a container."""
    if item.container:
        yield from _read_container(item, config)
        return
    record = Record(item.path, item.source)
    try:
        status = os.stat(item.file)
        if not stat.S_ISREG(status.st_mode):
            yield record.fail("not a regular file")
            return
        record.size_bytes = status.st_size
        with open(item.file, "rb") as file:
            if status.st_size > config.max_bytes:
                record.id = hashlib.file_digest(file, "sha256").hexdigest()
                record.language, record.doc_type = detect(item.path)
                yield record.drop("read", "size", status.st_size, f"> {config.max_bytes}")
                return
            data = file.read(config.max_bytes + 1)
    except OSError as error:
        yield record.fail(f"cannot be read: {error.strerror or error}")
        return
    yield judge_bytes(record, data, config)


def judge_bytes(record: Record, data: bytes, config: CorpusConfig) -> Record:
    """Size, emptiness, binary and encoding checks, then language; fills in the text of what passes."""
    record.id, record.size_bytes = hashlib.sha256(data).hexdigest(), len(data)
    record.language, record.doc_type = detect(record.path)
    if len(data) > config.max_bytes:
        return record.drop("read", "size", len(data), f"> {config.max_bytes}")
    if not data:
        return record.drop("read", "empty", 0, "= 0 bytes")
    if (nul := data.find(b"\0")) >= 0:
        return record.drop("read", "binary", nul, "a NUL byte (value: its position)")
    try:
        record.text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        return record.drop("read", "encoding", error.start, "not UTF-8 (value: first bad byte)")
    if record.doc_type in (UNKNOWN, EXCLUDED):
        reason = "unknown_language" if record.doc_type == UNKNOWN else "excluded_type"
        return record.drop("language", reason, None, record.language)
    return record


# ---- containers ----


def _read_container(item: Item, config: CorpusConfig) -> Iterator[Record]:
    """Documents of a jsonl or parquet file. One that ends early gives the documents before the cut and one failure."""
    rows = _parquet_rows(item) if item.file.endswith(".parquet") else _json_rows(item, config)
    try:
        for number, row in rows:
            yield row if isinstance(row, Record) else _document(item, number, row, config)
    except (*DAMAGE, pa.ArrowException) as error:
        yield Record(item.path, item.source).fail(f"damaged or truncated: {error}")


def _document(item: Item, number: int, row: dict[str, Any], config: CorpusConfig) -> Record:
    path = _first(row, PATH_COLUMNS) or f"{item.path}:{number}"
    record = Record(str(path), item.source)
    text = _first(row, TEXT_COLUMNS)
    repo, licence, stars = (_first(row, names) for names in (REPO_COLUMNS, LICENCE_COLUMNS, STARS_COLUMNS))
    record.repo = None if repo is None else str(repo)
    record.licence = (
        ",".join(map(str, licence)) if isinstance(licence, list) else None if licence is None else str(licence)
    )
    record.stars = None if stars is None else int(stars)
    time = row.get("commit_time")
    record.commit_time = None if time is None else int(time.timestamp() if hasattr(time, "timestamp") else time)
    if not isinstance(text, str):
        return record.fail(f"document {number}: the text is {type(text).__name__}, not a string")
    return judge_bytes(record, text.encode("utf-8", "surrogatepass"), config)


def _first(row: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def check_columns(item: Item) -> None:
    """Raise DataError if a parquet container, or the first line of a jsonl one, has no text column."""
    try:
        if item.file.endswith(".parquet"):
            names = pq.read_schema(item.file).names
        else:
            with open_decompressed(item.file) as file:
                first = json.loads(file.readline(BLOCK) or b"{}")
            names = list(first) if isinstance(first, dict) else []
            if not names:
                return
    except (*DAMAGE, ValueError, pa.ArrowException):
        return  # damage is reported where it is met
    if not set(TEXT_COLUMNS) & set(names):
        raise DataError(f"{item.file} has no column `text` or `content`; it has {', '.join(names)}: rename one")


def _parquet_rows(item: Item) -> Iterator[tuple[int, dict[str, Any] | Record]]:
    number = 0
    with pq.ParquetFile(item.file) as file:
        for batch in file.iter_batches(batch_size=64):
            for row in batch.to_pylist():
                yield number, row
                number += 1


def _json_rows(item: Item, config: CorpusConfig) -> Iterator[tuple[int, dict[str, Any] | Record]]:
    limit = LINE_FACTOR * config.max_bytes + BLOCK
    with open_decompressed(item.file) as file:
        number = 0
        while line := file.readline(limit):
            number += 1
            where = Record(f"{item.path}:{number}", item.source)
            if len(line) == limit and not line.endswith(b"\n"):
                where.id, where.size_bytes = _skip_line(file, line)
                yield number, where.drop("read", "size", where.size_bytes, f"line > {limit}")
                continue
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                yield number, where.fail(f"line {number} is not JSON: {error}")
                continue
            yield number, row if isinstance(row, dict) else where.fail(f"line {number} is not a JSON object")


def _skip_line(file: BinaryIO, start: bytes) -> tuple[str, int]:
    """Read on to the end of the line; its hash and length."""
    digest, size = hashlib.sha256(start), len(start)
    while part := file.readline(BLOCK):
        digest.update(part)
        size += len(part)
        if part.endswith(b"\n"):
            break
    return digest.hexdigest(), size


def to_table(records: list[Record]) -> pa.Table:
    """Records as a table of SCHEMA."""
    return pa.Table.from_pylist([asdict(r) for r in records], schema=SCHEMA)
