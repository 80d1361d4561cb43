"""Dedup against corpora that exist already: output folders of `build-corpus`.

Their files come before all others in the order of the keep rule, so a new file that belongs to a group with one of them is
dropped and names it. The existing corpus is never changed.

Keys come from DIR/signatures.parquet if it is there, else from the texts in DIR/clean. The two differ where the build
changed texts after dedup (headers, personal data): stored keys are those of the texts as they were compared.

The signature file is Parquet with one row per file of clean/ in the order of its parts: id, `first` (8 bytes per band) and
`full` (16 bytes per band), little-endian; the schema's metadata say with which recipe they were made."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from opencoder.errors import ConfigError, DataError
from opencoder.files import atomic_path

from ..minhash import Texts
from .curve import FIRST_ROWS, Recipe
from .groups import Forest
from .keys import KEY, first_keys, full_keys
from .run import Batch

SIGNATURES = "signatures.parquet"
_HEADER = b"opencoder.signatures"
VERSION = 1
"""Of the file's layout and of the hashes of every scheme."""


class Existing(NamedTuple):
    """The files of existing corpora, numbered from 0."""

    ids: list[str]
    paths: list[str]
    batches: list[Batch]
    """One per part of clean/; give them to `near_duplicates` before the new files', which are numbered from len(ids) on."""

    def exact(self, ids: Iterable[str]) -> dict[int, int]:
        """row → number of the existing file with the same id, for rows of new files."""
        known = {known_id: number for number, known_id in reversed(list(enumerate(self.ids)))}
        return {row: known[each] for row, each in enumerate(ids) if each in known}

    def matches(self, forest: Forest) -> dict[int, int]:
        """number of a new file → number of the existing file that it is dropped for."""
        rows = forest[(forest[:, 0] < len(self.ids)) & (forest[:, 1] >= len(self.ids))]
        return {int(new): int(known) for known, new in rows}


def write_signatures(path: Path, batches: Iterable[tuple[list[str], Texts]], recipe: Recipe) -> None:
    """Write the keys of files given as (ids, texts), a batch at a time. Whole signatures are computed for every file, at
    the speed of one pass over all slots."""
    schema = _schema(recipe)
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, schema, compression="none") as writer:
        for ids, texts in batches:
            first, full = first_keys(texts, recipe), full_keys(texts, recipe)
            columns = [pa.array(ids, pa.string()), _blobs(first, recipe.bands * 8), _blobs(full, recipe.bands * 16)]
            writer.write_table(pa.table(columns, schema=schema))


def read_signatures(path: Path, recipe: Recipe) -> tuple[list[str], NDArray[np.uint64], NDArray[Any]]:
    """(ids, first keys, full keys). Raises ConfigError if they were made with another recipe, DataError for another file."""
    check_signatures(path, recipe)
    table = pq.read_table(path)
    keys = [b"".join(table[name].to_pylist()) for name in ("first", "full")]
    first = np.frombuffer(keys[0], "<u8").reshape(-1, recipe.bands)
    return table["id"].to_pylist(), first, np.frombuffer(keys[1], KEY).reshape(-1, recipe.bands)


def check_signatures(path: Path, recipe: Recipe) -> None:
    """Raise ConfigError for a file made with another recipe, DataError for one that holds no signatures. Reads no rows."""
    try:
        header = json.loads(pq.read_schema(path).metadata[_HEADER])
    except (pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} is not a signature file ({error}): delete it to compute the keys from the texts"
        ) from None
    mine = _header(recipe)
    wrong = [
        f"{name} is {header.get(name)} there and {value} here"
        for name, value in mine.items()
        if header.get(name) != value
    ]
    if wrong:
        raise ConfigError(
            f"{path}: {'; '.join(wrong)}: use the same dedup settings, or delete the file to compute the keys anew"
        )


def read_existing(folders: Iterable[Path], recipe: Recipe | None) -> Existing:
    """The files of corpora, in the order of folders, parts and rows. `recipe` None: ids and paths alone, for exact dedup.

    Raises DataError for a folder that holds no finished corpus, ConfigError for signatures of another recipe."""
    ids: list[str] = []
    paths: list[str] = []
    batches: list[Batch] = []
    for folder in folders:
        parts = sorted((folder / "clean").glob("*.parquet"))
        if not parts or not (folder / "manifest.json").is_file():
            raise DataError(f"{folder} holds no finished corpus: give the output folder of a build-corpus run")
        stored = None
        if recipe is not None and (folder / SIGNATURES).is_file():
            stored = read_signatures(folder / SIGNATURES, recipe)
        begin = len(ids)
        for part in parts:
            table = pq.read_table(part, columns=["id", "path"])
            numbers = np.arange(len(ids), len(ids) + len(table), dtype=np.int64)
            here = slice(len(ids) - begin, len(ids) - begin + len(table))
            ids += table["id"].to_pylist()
            paths += table["path"].to_pylist()
            keys = (None, None) if stored is None else (stored[1][here], stored[2][here])
            batches.append(Batch(numbers, partial(_texts, part), *keys))
        if stored is not None and stored[0] != ids[begin:]:
            raise DataError(
                f"{folder / SIGNATURES} is not of the files in {folder / 'clean'}: delete it, or build again"
            )
    return Existing(ids, paths, batches if recipe is not None else [])


def _texts(part: Path) -> Texts:
    return pq.read_table(part, columns=["text"])["text"]


def _header(recipe: Recipe) -> dict[str, Any]:
    return {"version": VERSION, "first_rows": min(FIRST_ROWS, recipe.rows), **recipe._asdict()}


def _schema(recipe: Recipe) -> pa.Schema:
    fields = [("id", pa.string()), ("first", pa.binary(8 * recipe.bands)), ("full", pa.binary(16 * recipe.bands))]
    return pa.schema(fields, metadata={_HEADER: json.dumps(_header(recipe)).encode()})


def _blobs(keys: NDArray[Any], width: int) -> pa.Array:
    data = pa.py_buffer(np.ascontiguousarray(keys).tobytes())
    return pa.Array.from_buffers(pa.binary(width), len(keys), [None, data])
