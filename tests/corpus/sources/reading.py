"""What the tests of all source forms share."""

from __future__ import annotations

from pathlib import Path

from opencoder.config import load_corpus_config
from opencoder.corpus.read import Item, Record, find_items, read_item
from opencoder.corpus_config import CorpusConfig


def config(*overrides: str) -> CorpusConfig:
    return load_corpus_config(None, list(overrides))


def items(source: Path | str, *overrides: str) -> list[Item]:
    return find_items([str(source)], config(*overrides))


def read(source: Path | str, *overrides: str) -> list[Record]:
    settings = config(*overrides)
    return [record for item in find_items([str(source)], settings) for record in read_item(item, settings)]


def by_path(records: list[Record]) -> dict[str, Record]:
    found = {record.path: record for record in records}
    assert len(found) == len(records), sorted(record.path for record in records)
    return found


def fates(records: list[Record]) -> dict[str, tuple[str, str | None]]:
    """path → (status, reason)."""
    return {path: (record.status, record.reason) for path, record in by_path(records).items()}
