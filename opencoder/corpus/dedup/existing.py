"""Dedup against corpora that exist already: output folders of `build-corpus`.

Their files come before all others in the order of the keep rule, so a new file that belongs to a group with one of them is
dropped and names it. The existing corpus is never changed.

Keys come from DIR/signatures.parquet if it is there, else from the texts in DIR/clean. The two differ where the build
changed texts after dedup (headers, personal data): stored keys are those of the texts as they were compared.

The signature file is Parquet with one row per file of clean/ in the order of its parts: id, `first` (8 bytes per band) and
`full` (16 bytes per band), little-endian; the schema's metadata say with which recipe they were made."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
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
from .keys import KEY, first_keys, full_keys

SIGNATURES = "signatures.parquet"
_HEADER = b"opencoder.signatures"
VERSION = 1
"""Of the file's layout and of the hashes of every scheme."""


class Existing(NamedTuple):
    """The files of existing corpora, numbered from 0, before all others."""

    parts: Sequence[Path]
    """Of their clean/ folders."""
    starts: NDArray[np.int64]
    """(parts + 1,) number of the first file of each part, then the number of files."""
    ids: pa.ChunkedArray
    paths: pa.ChunkedArray


def read_existing(parts: Sequence[Path]) -> Existing:
    """The files of parts of clean/ folders, in their order."""
    tables = [pq.read_table(part, columns=["id", "path"]) for part in parts]
    ids, paths = (
        pa.chunked_array([chunk for table in tables for chunk in table[name].chunks], pa.string())
        for name in ("id", "path")
    )
    return Existing(parts, np.cumsum([0, *map(len, tables)]), ids, paths)


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
    """Raise ConfigError for a file made with another recipe, DataError for one that holds no signatures, or those of another
    number of files than the clean/ beside it. Reads no rows."""
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
    clean = list((path.parent / "clean").glob("*.parquet"))
    if clean and sum(pq.read_metadata(part).num_rows for part in clean) != pq.read_metadata(path).num_rows:
        raise DataError(f"{path} is not of the files in {path.parent / 'clean'}: delete it to compute the keys anew")


def _header(recipe: Recipe) -> dict[str, Any]:
    return {"version": VERSION, "first_rows": min(FIRST_ROWS, recipe.rows), **recipe._asdict()}


def _schema(recipe: Recipe) -> pa.Schema:
    fields = [("id", pa.string()), ("first", pa.binary(8 * recipe.bands)), ("full", pa.binary(16 * recipe.bands))]
    return pa.schema(fields, metadata={_HEADER: json.dumps(_header(recipe)).encode()})


def _blobs(keys: NDArray[Any], width: int) -> pa.Array:
    data = pa.py_buffer(np.ascontiguousarray(keys).tobytes())
    return pa.Array.from_buffers(pa.binary(width), len(keys), [None, data])
