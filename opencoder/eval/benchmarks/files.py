"""Rows of task files: jsonl(.gz, .zst), json lists and parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opencoder.compressed import ERRORS as DAMAGE
from opencoder.corpus import json_lines
from opencoder.errors import DataError, UserError

MAX_LINE = 1 << 30
"""Bytes of one line: the private tests of LiveCodeBench are large."""
SUFFIXES = (*json_lines.SUFFIXES, ".json", ".parquet")


def rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of each task. Raises UserError for a file that is missing or of another kind, DataError for a damaged one."""
    path = Path(path)
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"task file {path}: allowed are {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise UserError(f"task file {path} does not exist")
    if path.suffix == ".parquet":
        yield from _parquet(path)
    elif path.suffix == ".json":
        yield from _json(path)
    else:
        try:
            for number, row in json_lines.objects(path, max_line=MAX_LINE):
                yield f"{path}, line {number}", row
        except DAMAGE as error:
            raise DataError(f"{path} is damaged or cut off: {error}") from error


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is no parquet file: {error}") from error
    for number, row in enumerate(table.to_pylist()):
        yield f"{path}, row {number}", row


def _json(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is no JSON: {error}") from error
    items = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise DataError(f"{path}: a list of objects is needed, or an object of objects")
    for number, row in enumerate(items):
        yield f"{path}, item {number}", row
