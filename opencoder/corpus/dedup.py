"""Exact and near-duplicate removal: groups, and which member of each group is kept.

Keep rule: most stars, then latest commit, then smallest path. The result does not depend on the order of the rows."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from .minhash import EMPTY, shingles

PRESETS: dict[str, tuple[int, int, int]] = {"opencoder": (16, 128, 5), "bigcode": (25, 10, 5), "datatrove": (14, 8, 5)}
"""name → bands, rows per band, tokens per shingle (arXiv:2411.04905; bigcode-dataset; datatrove)."""

KEY = np.dtype([("a", "<u8"), ("b", "<u8")])
"""A band's hash."""


def candidate_probability(jaccard: float, bands: int, rows: int) -> float:
    """Chance that two texts of this similarity agree in at least one band: 1 − (1 − J^rows)^bands."""
    return 1.0 - (1.0 - jaccard**rows) ** bands


def s_curve(bands: int, rows: int) -> list[tuple[float, float]]:
    """(J, probability of being found) from 0.5 to 1."""
    return [(j / 100, candidate_probability(j / 100, bands, rows)) for j in range(50, 101)]


def threshold(bands: int, rows: int) -> float:
    """The similarity at which the S-curve is steep, about (1/bands)^(1/rows)."""
    return float((1 / bands) ** (1 / rows))


def jaccard(a: str, b: str, ngram: int) -> float:
    """True similarity of the shingle sets of two texts; 1 if neither has any."""
    x, y = shingles(a, ngram), shingles(b, ngram)
    return len(x & y) / len(x | y) if x or y else 1.0


def ranks(table: pa.Table) -> NDArray[np.int64]:
    """Position of each row in the order of the keep rule: 0 is the one to keep before all others.

    Columns: stars and commit_time (int64, null = unknown = lowest), path, id, key (source; the last resort)."""
    stars = table["stars"].fill_null(-1).to_numpy().astype(np.int64)
    times = table["commit_time"].fill_null(np.iinfo(np.int64).min + 1).to_numpy().astype(np.int64)
    # Strings are compared as their UTF-8 bytes; lexsort's last key counts most.
    names = [np.array([s.encode() for s in table[c].to_pylist()], dtype=object) for c in ("key", "id", "path")]
    codes = [np.unique(n, return_inverse=True)[1] if len(n) else np.zeros(0, np.int64) for n in names]
    order = np.lexsort((*codes, -times, -stars))
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return rank


def _kept(labels: NDArray[Any], rank: NDArray[np.int64]) -> dict[int, int]:
    """row → kept row, for every row that is not its group's best."""
    order = np.lexsort((rank, labels))
    first = np.ones(len(order), bool)
    first[1:] = labels[order][1:] != labels[order][:-1]
    best = order[np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))] if len(order) else order
    return {int(row): int(keep) for row, keep in zip(order, best, strict=True) if row != keep}


def exact_duplicates(table: pa.Table) -> dict[int, int]:
    """row → kept row for rows whose `id` (SHA-256 of the bytes) another, better row has."""
    _, labels = np.unique(np.array(table["id"].to_pylist(), dtype="S64"), return_inverse=True)
    return _kept(labels, ranks(table))


def band_keys(signatures: NDArray[Any], bands: int, rows: int) -> NDArray[Any]:
    """(documents, bands) 128-bit hashes of each band, and zero where the row is all-max: what LSH needs to keep of a
    signature (256 bytes instead of 8 KB for 16 bands of 128)."""
    if signatures.shape[1] < bands * rows:
        raise ValueError(f"{bands} bands of {rows} rows need {bands * rows} permutations, got {signatures.shape[1]}")
    keys = np.zeros((len(signatures), bands), dtype=KEY)
    for i, row in enumerate(np.ascontiguousarray(signatures)):
        if (row == EMPTY).all():
            continue
        parts = (row[band * rows : (band + 1) * rows].tobytes() for band in range(bands))
        digests = b"".join(hashlib.blake2b(part, digest_size=16).digest() for part in parts)
        keys[i] = np.frombuffer(digests, dtype=KEY)
    return keys


def edges_of_keys(keys: NDArray[Any]) -> NDArray[np.int64]:
    """(edges, 2): rows whose key in some band is the same, each with the smallest of its bucket; zero keys have none."""
    edges = [np.empty((0, 2), np.int64)]
    for band in range(keys.shape[1]):
        column = np.ascontiguousarray(keys[:, band])
        alive = np.flatnonzero((column["a"] != 0) | (column["b"] != 0))
        _, first, bucket = np.unique(column[alive], return_index=True, return_inverse=True)
        smallest = first[bucket]
        other = np.flatnonzero(smallest != np.arange(len(alive)))
        edges.append(np.stack([alive[smallest[other]], alive[other]], 1))
    return np.unique(np.concatenate(edges), axis=0)


def lsh_edges(signatures: NDArray[Any], bands: int, rows: int) -> NDArray[np.int64]:
    """(edges, 2): rows that agree in a whole band. All-max rows have none."""
    return edges_of_keys(band_keys(signatures, bands, rows))


def components(n: int, edges: NDArray[np.int64]) -> NDArray[np.int32]:
    """(n,) label of each row's connected component."""
    graph = coo_matrix((np.ones(len(edges), bool), (edges[:, 0], edges[:, 1])), shape=(n, n))
    labels: NDArray[np.int32] = connected_components(graph, directed=False)[1]
    return labels


def fuzzy_duplicates(signatures: NDArray[Any], table: pa.Table, *, bands: int, rows: int) -> dict[int, int]:
    """row → kept row for rows in a near-duplicate cluster with a better one; columns of `table` as in `ranks`."""
    return fuzzy_duplicates_of_keys(band_keys(signatures, bands, rows), table)


def fuzzy_duplicates_of_keys(keys: NDArray[Any], table: pa.Table) -> dict[int, int]:
    """The same from the band keys alone."""
    return _kept(components(len(keys), edges_of_keys(keys)), ranks(table))
