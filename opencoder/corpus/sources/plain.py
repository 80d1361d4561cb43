"""Plain files."""

from __future__ import annotations

import hashlib
import os

from opencoder.corpus_config import CorpusConfig

from .items import Item
from .opening import NotRegularError, is_url, open_binary, open_regular
from .record import Record, judge_bytes, judge_large, what

BLOCK = 1 << 20


def read_file(item: Item, config: CorpusConfig) -> Record:
    """The record of one file. Never holds more of it than `max_bytes`; a larger one is hashed in blocks."""
    record = Record(item.path, item.source, repo=item.repo_of(item.path, config.read))
    try:
        if is_url(item.file):
            return _read_remote(item, record, config)
        fd = open_regular(item.file)
        try:
            return _read_local(fd, record, config)
        finally:
            os.close(fd)
    except NotRegularError as error:
        return record.fail(str(error))
    except OSError as error:
        return record.fail(f"cannot be read: {what(error)}")


def _read_local(fd: int, record: Record, config: CorpusConfig) -> Record:
    status = os.fstat(fd)
    record.size_bytes = status.st_size
    if status.st_size > config.max_bytes:
        digest, size = hashlib.sha256(), 0
        while block := os.read(fd, BLOCK):
            digest.update(block)
            size += len(block)
        return judge_large(record, size, digest.hexdigest(), config)
    # One byte more than the file has shows its end at once; a file that grows meanwhile is read on to the limit.
    data = os.read(fd, status.st_size + 1)
    if len(data) != status.st_size:
        parts, got = [data], len(data)
        while got <= config.max_bytes and (more := os.read(fd, config.max_bytes + 1 - got)):
            parts.append(more)
            got += len(more)
        data = b"".join(parts)
    return judge_bytes(record, data, config)


def _read_remote(item: Item, record: Record, config: CorpusConfig) -> Record:
    with open_binary(item.file) as file:
        data = file.read(config.max_bytes + 1)
        if len(data) <= config.max_bytes:
            return judge_bytes(record, data, config)
        digest, size = hashlib.sha256(data), len(data)
        while block := file.read(BLOCK):
            digest.update(block)
            size += len(block)
    return judge_large(record, size, digest.hexdigest(), config)
