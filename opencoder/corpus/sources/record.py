"""What every source gives: one record per file or document, and the checks that all of them pass."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

import pyarrow as pa

from opencoder.corpus_config import CorpusConfig

from ..language import EXCLUDED, UNKNOWN, detect, tables
from ..transform.licence import MAX_LICENCE_CHARS, is_licence_file
from . import notebook

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
        ("licence_type", pa.string()),
        ("blob_id", pa.string()),
        ("status", pa.string()),
        ("stage", pa.string()),
        ("reason", pa.string()),
        ("value", pa.float64()),
        ("threshold", pa.string()),
        ("text", pa.large_string()),
    ]
)

LFS = b"version https://git-lfs.github.com/spec/v1\n"
LFS_BYTES = 1024
"""A pointer file is smaller than this (git-lfs specification)."""

_OTHER_NAMES = {"c++": "cpp", "c#": "csharp"}
"""Linguist's names, as data sets state them, that the table calls otherwise; the rest differ in case only."""


@dataclass(slots=True)
class Record:
    """One file or document on its way; `status` is kept, dropped or failed."""

    path: str
    source: str
    id: str | None = None
    """SHA-256 (hex) of the bytes as read."""
    repo: str | None = None
    language: str | None = None
    doc_type: str | None = None
    size_bytes: int = 0
    stars: int | None = None
    commit_time: int | None = None
    """Unix time in seconds."""
    licence: str | None = None
    """Comma-separated identifiers as the source states them."""
    licence_type: str | None = None
    """As The Stack v2 states it: permissive, no_license…"""
    blob_id: str | None = None
    """Git's name of the content, where the source knows it (git, Software Heritage)."""
    status: str = "kept"
    stage: str | None = None
    reason: str | None = None
    value: float | None = None
    threshold: str | None = None
    text: str | None = None
    licence_text: str | None = None
    """Of a licence file, also where the record itself is dropped: LICENSE-MIT has no language, and yet speaks for its folder."""

    def drop(self, stage: str, reason: str, value: float | None = None, threshold: str | None = None) -> Record:
        """Mark as dropped; the text is let go."""
        self.status, self.stage, self.reason, self.value, self.threshold = "dropped", stage, reason, value, threshold
        self.text = None
        return self

    def fail(self, reason: str) -> Record:
        """Mark as failed: it could not be read."""
        self.status, self.stage, self.reason, self.text = "failed", "read", printable(reason), None
        return self


def printable(name: str) -> str:
    r"""A name in valid Unicode: bytes of a file name that are not UTF-8 appear as \xNN, lone surrogates as \uNNNN."""
    if name.isascii():
        return name
    try:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        return name.encode("utf-8", "backslashreplace").decode("utf-8")


def what(error: Exception) -> str:
    """An error in words, without the path that the system adds: the record has it."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def to_table(records: list[Record]) -> pa.Table:
    """Records as a table of SCHEMA."""
    columns = [[getattr(record, name) for record in records] for name in SCHEMA.names]
    return pa.table([pa.array(c, field.type) for c, field in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)


def judge_large(record: Record, size: int, digest: str, config: CorpusConfig) -> Record:
    """Drop what is larger than `max_bytes` and was therefore only hashed."""
    record.id, record.size_bytes = digest, size
    _set_language(record, config)
    return record.drop("read", "size", size, f"> {config.max_bytes}")


def judge_link(record: Record, target: str) -> Record:
    """Drop a link inside an archive or a repository: what it points to is read under its own name, or is outside."""
    return record.drop("read", "link", None, f"a link to {printable(target)[:200]}; links are not followed")


def judge_bytes(record: Record, data: bytes, config: CorpusConfig, text: str | None = None) -> Record:
    """Size, stars, emptiness, notebook, binary and encoding checks, then language; fills in the text of what passes.

    `text` is given by sources that hold strings; `data` is then its UTF-8 form."""
    record.id, record.size_bytes = hashlib.sha256(data).hexdigest(), len(data)
    _set_language(record, config)
    if len(data) > config.max_bytes:
        return record.drop("read", "size", len(data), f"> {config.max_bytes}")
    if (least := config.read.min_stars) is not None and (record.stars is None or record.stars < least):
        unknown = "the number of stars is not known; " if record.stars is None else ""
        return record.drop("read", "stars", record.stars, f"{unknown}< {least}")
    if not data:
        return record.drop("read", "empty", 0, "= 0 bytes")
    if config.read.notebooks.structured and record.path.endswith(".ipynb"):
        return _judge_notebook(record, data, config)
    if (nul := data.find(b"\0")) >= 0:
        return record.drop("read", "binary", nul, "a NUL byte (value: its position)")
    if len(data) < LFS_BYTES and data.startswith(LFS):
        found = re.search(rb"^size (\d{1,18})$", data, re.M)
        size = int(found[1]) if found else None
        return record.drop("read", "lfs_pointer", size, "a git-lfs pointer (value: bytes of the file it stands for)")
    try:
        record.text = data.decode("utf-8") if text is None else text
    except UnicodeDecodeError as error:
        return record.drop("read", "encoding", error.start, "not UTF-8 (value: first bad byte)")
    if is_licence_file(record.path):
        record.licence_text = record.text[:MAX_LICENCE_CHARS]
    if record.doc_type in (UNKNOWN, EXCLUDED):
        reason = "unknown_language" if record.doc_type == UNKNOWN else "excluded_type"
        return record.drop("language", reason, None, record.language)
    return record


def _set_language(record: Record, config: CorpusConfig) -> None:
    """By the path; what the source stated (in `language`) counts only where the path says nothing."""
    stated = record.language
    record.language, record.doc_type = detect(record.path, compat=config.rules.compat)
    if stated is not None and record.doc_type == UNKNOWN:
        name = _OTHER_NAMES.get(stated.lower(), stated.lower())
        if (doc_type := tables().doc_types.get(name)) is not None:
            record.language, record.doc_type = name, doc_type


def _judge_notebook(record: Record, data: bytes, config: CorpusConfig) -> Record:
    try:
        record.text = notebook.to_text(data, max_output_chars=config.read.notebooks.max_output_chars)
    except notebook.NotebookError as error:
        return record.fail(f"not a readable notebook: {error}")
    if not record.text:
        return record.drop("read", "empty", 0, "a notebook without content")
    record.doc_type = "code"  # of the table's "excluded" only the JSON form is meant
    return record
