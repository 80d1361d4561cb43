"""What counts as one document when duplicates are looked for: a file, a whole repository, or a chunk of a file. For the
ablation of arXiv:2411.04905 (file level keeps the fewest tokens and trains the better model).

Repository: its files, concatenated in the order of their paths with a newline between; a file without a repository stands
for itself. A repository is kept or dropped as a whole.

Chunk: CHUNK_TOKENS tokens of a file, the last one shorter. A token here is a run of word characters or one other character
that is not white space (`\\w+|[^\\w\\s]`), about 4.6 bytes of Python, which is near to a language model's; it needs no tokenizer
and never changes. Chunks cover their file without gap: white space before a token belongs to the chunk before."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

CHUNK_TOKENS = 4096
_TOKEN = re.compile(r"\w+|[^\w\s]")


def chunks(text: str, tokens: int = CHUNK_TOKENS) -> list[str]:
    """The chunks of a text, at least one; joined, they are the text."""
    if tokens < 1:
        raise ValueError(f"tokens={tokens} must be at least 1")
    starts = [match.start() for i, match in enumerate(_TOKEN.finditer(text)) if i and i % tokens == 0]
    return [text[a:b] for a, b in zip([0, *starts], [*starts, len(text)], strict=True)]


def chunk_name(path: str, number: int) -> str:
    """The path under which a chunk (from 0) is known: that of its file, `#` and the number in six digits."""
    return f"{path}#{number:06d}"


class Units(NamedTuple):
    """Repositories in place of files."""

    table: pa.Table
    """One row per unit with the columns that `ranks` reads: stars and commit_time are the largest of the files', path is
    the repository's name (or the lone file's path), id the SHA-256 of the files' ids in order."""
    rows: list[NDArray[np.int64]]
    """The rows of each unit's files, in the order of their paths."""

    def spread(self, dropped_units: dict[int, int]) -> dict[int, int]:
        """row → kept row for the files of dropped units; the kept row is the first file of the unit that stays."""
        return {int(row): int(self.rows[kept][0]) for unit, kept in dropped_units.items() for row in self.rows[unit]}


def repositories(table: pa.Table) -> Units:
    """The units of a table with columns repo, stars, commit_time, path, id, key."""
    names = ("repo", "path", "key", "id", "stars", "commit_time")
    repo, path, key, ids, stars, times = (table[name].to_pylist() for name in names)
    groups: dict[tuple[bool, Any], list[int]] = {}
    for row in sorted(range(len(path)), key=lambda r: (path[r].encode(), key[r].encode(), ids[r])):
        # A file without a repository is its own unit.
        groups.setdefault((repo[row] is not None, row if repo[row] is None else repo[row]), []).append(row)
    units: dict[str, list[Any]] = {name: [] for name in names[1:]}
    for (named, name), rows in groups.items():
        units["path"].append(name if named else path[rows[0]])
        units["key"].append("" if named else key[rows[0]])
        units["id"].append(hashlib.sha256("".join(ids[r] for r in rows).encode()).hexdigest())
        for column, values in (("stars", stars), ("commit_time", times)):
            units[column].append(max((values[r] for r in rows if values[r] is not None), default=None))
    types = {"stars": pa.int64(), "commit_time": pa.int64()}
    made = pa.table({name: pa.array(values, types.get(name, pa.string())) for name, values in units.items()})
    return Units(made, [np.array(rows, np.int64) for rows in groups.values()])


def repository_text(texts: Iterable[str]) -> str:
    """The document that a repository is, from its files' texts in the order of `Units.rows`."""
    return "\n".join(texts)
