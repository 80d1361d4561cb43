"""Which member of a group stays: most stars, then latest commit, then smallest path. The result does not depend on the
order of the rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from opencoder.errors import DataError

from .groups import forest_of_keys, labels_of
from .keys import KEY, band_keys

_ORDER = (("stars", "descending"), ("commit_time", "descending"), ("path", "ascending"), ("id", "ascending"),
          ("key", "ascending"), ("row", "ascending"))  # fmt: skip
_LOWEST = {"stars": -1, "commit_time": np.iinfo(np.int64).min + 1}


def ranks(table: pa.Table) -> NDArray[np.int64]:
    """Position of each row in the order of the keep rule: 0 is the one to keep before all others.

    Columns: stars and commit_time (int64, null = unknown = lowest), path, id, key (source; the last resort). Strings are
    compared as their UTF-8 bytes."""
    columns = {name: table[name] for name in ("path", "id", "key")}
    columns |= {name: pc.fill_null(table[name], lowest) for name, lowest in _LOWEST.items()}
    columns["row"] = pa.array(np.arange(len(table)))  # settles rows that are equal in everything
    order = pc.sort_indices(pa.table(columns), sort_keys=list(_ORDER)).to_numpy()
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return rank


def kept_rows(labels: NDArray[Any], rank: NDArray[np.int64]) -> NDArray[np.int64]:
    """(rows,) the best row of each row's group."""
    if len(labels) == 0:
        return np.zeros(0, np.int64)
    order = np.lexsort((rank, labels))
    first = np.ones(len(order), bool)
    first[1:] = labels[order][1:] != labels[order][:-1]
    kept = np.empty(len(order), np.int64)
    kept[order] = order[np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))]
    return kept


def dropped(labels: NDArray[Any], rank: NDArray[np.int64]) -> dict[int, int]:
    """row → kept row, for every row that is not its group's best."""
    return _changed(kept_rows(labels, rank))


def _changed(kept: NDArray[np.int64]) -> dict[int, int]:
    rows = np.flatnonzero(kept != np.arange(len(kept)))
    return dict(zip(rows.tolist(), kept[rows].tolist(), strict=True))


def exact_duplicates(table: pa.Table) -> dict[int, int]:
    """row → kept row for rows whose `id` (SHA-256 of the bytes) another, better row has."""
    return _changed(exact_kept(table))


def exact_kept(table: pa.Table) -> NDArray[np.int64]:
    """(rows,) of each row the best one with the same `id`, often itself."""
    codes = pc.dictionary_encode(table["id"]).combine_chunks()
    if isinstance(codes, pa.ChunkedArray):  # older releases keep a single chunk wrapped
        codes = codes.chunk(0) if codes.num_chunks else pa.array([], pa.string()).dictionary_encode()
    return kept_rows(codes.indices.to_numpy(zero_copy_only=False), ranks(table))


def id_keys(ids: pa.ChunkedArray | pa.Array) -> NDArray[Any]:
    """(rows, 1) of KEY: the first 128 bits of SHA-256 ids in hex, for exact groups by the steps of `groups`.

    10^10 files have an accidental match with a chance of 1.5e-19. Raises DataError for an id that is not SHA-256 in hex."""
    text = ids.to_pylist()
    try:
        if any(len(each) != 64 for each in text):
            raise ValueError
        digests = np.frombuffer(bytes.fromhex("".join(text)), np.uint8).reshape(len(text), 32)
    except (TypeError, ValueError):
        wrong = next((each for each in text if not _is_digest(each)), None)
        raise DataError(f"id {wrong!r} is not a SHA-256 digest: 64 hexadecimal digits are needed") from None
    keys = np.ascontiguousarray(digests[:, :16]).view(KEY)
    keys["a"] = np.where((keys["a"] == 0) & (keys["b"] == 0), 1, keys["a"])  # zero means no key
    return keys


def _is_digest(text: str | None) -> bool:
    return text is not None and len(text) == 64 and all(c in "0123456789abcdefABCDEF" for c in text)


def fuzzy_duplicates(signatures: NDArray[Any], table: pa.Table, *, bands: int, rows: int) -> dict[int, int]:
    """row → kept row for rows in a near-duplicate cluster with a better one; columns of `table` as in `ranks`."""
    return fuzzy_duplicates_of_keys(band_keys(signatures, bands, rows), table)


def fuzzy_duplicates_of_keys(keys: NDArray[Any], table: pa.Table) -> dict[int, int]:
    """The same from the band keys alone."""
    found = forest_of_keys(keys)
    return dropped(labels_of(found, np.arange(len(keys), dtype=np.int64)), ranks(table))
