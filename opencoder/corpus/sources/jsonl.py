"""Documents in JSON lines, plain or compressed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import BinaryIO

from opencoder.compressed import ERRORS, decompressed
from opencoder.corpus_config import CorpusConfig

from ..json_lines import object_of
from .fields import documents
from .items import Item
from .opening import open_binary
from .record import Record, what

BLOCK = 1 << 20
LINE_FACTOR = 6
"""A JSON line may be this many times longer than its text (\\u escapes) before it is taken for too large."""


def read_jsonl(item: Item, config: CorpusConfig) -> Iterator[Record]:
    """A record for each line that is not blank. A file that ends early gives the documents before and one failure.

    A document without a path is named FILE:LINE, or FILE@BYTE in a file that is read in parts: a part does not know how
    many lines stand before it."""
    try:
        with open_binary(item.file) as packed, decompressed(packed, item.file) as file:
            for name, where, line in _lines(item, file, config):
                if isinstance(line, Record):
                    yield line
                elif not isinstance(row := object_of(line), dict):
                    yield Record(name, item.source, size_bytes=len(line)).fail(f"{where} {row}")
                else:
                    yield from documents(item, name, row, config)
    except ERRORS as error:
        yield Record(item.path, item.source).fail(f"damaged or truncated: {what(error)}")


def first_columns(item: Item) -> list[str]:
    """The keys of the first line; none if it cannot be told."""
    with open_binary(item.file) as packed, decompressed(packed, item.file) as file:
        row = object_of(file.readline(BLOCK) or b"{}")
    return list(row) if isinstance(row, dict) else []


def _lines(item: Item, file: BinaryIO, config: CorpusConfig) -> Iterator[tuple[str, str, bytes | Record]]:
    """(name, place, line) of the lines that begin in the item's part, or a record of one that is too long."""
    limit = LINE_FACTOR * config.max_bytes + BLOCK
    at, end = 0, None
    if item.parts > 1:
        total = file.seek(0, 2)
        at, end = total * item.part // item.parts, total * (item.part + 1) // item.parts
        if at:  # the line that the cut falls into belongs to the part before
            file.seek(at - 1)
            at += _skip_line(file, b"")[1] - 1
        else:
            file.seek(0)
    number = 0
    while (end is None or at < end) and (line := file.readline(limit)):
        number += 1
        name, where = f"{item.path}:{number}", f"line {number}"
        if end is not None:
            name, where = f"{item.path}@{at}", f"the line at byte {at}"
        size = len(line)
        if size == limit and not line.endswith(b"\n"):
            record = Record(name, item.source)
            record.id, size = _skip_line(file, line)
            record.size_bytes = size
            yield name, where, record.drop("read", "size", size, f"line > {limit}")
        elif not line.isspace():
            yield name, where, line
        at += size


def _skip_line(file: BinaryIO, start: bytes) -> tuple[str, int]:
    """Read on to the end of the line; its hash and length."""
    digest, size = hashlib.sha256(start), len(start)
    while part := file.readline(BLOCK):
        digest.update(part)
        size += len(part)
        if part.endswith(b"\n"):
            break
    return digest.hexdigest(), size
