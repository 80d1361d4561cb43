"""JSON lines: the object of one line, and the objects of a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opencoder.compressed import open_decompressed
from opencoder.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")


def object_of(line: bytes) -> dict[str, Any] | str:
    """The object of a line, or what is wrong with the line, as what follows its name: `is not JSON: …`."""
    try:
        row = json.loads(line)
    except RecursionError:
        return "is nested too deeply"
    except ValueError as error:
        return f"is not JSON: {error}"
    return row if isinstance(row, dict) else f"is a JSON {type(row).__name__}, not an object"


def objects(path: Path, *, max_line: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of the line, from 1; its object) of every line of a file with one of SUFFIXES that is not blank.

    Raises DataError with file and line for one of more than `max_line` bytes or without an object, and what
    opencoder.compressed.ERRORS lists where the file is damaged."""
    with open_decompressed(path) as file:
        number = 0
        while line := file.readline(max_line + 1):
            number += 1
            if len(line) > max_line:
                raise DataError(f"{path}, line {number} is longer than {max_line} bytes")
            if not line.strip():
                continue
            row = object_of(line)
            if isinstance(row, str):
                raise DataError(f"{path}, line {number} {row}")
            yield number, row
