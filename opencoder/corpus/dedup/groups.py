"""From band keys to groups of near-duplicates, in steps that can each run as many tasks.

Documents carry numbers, unique over the corpus. Where they are numbered in the order of the keep rule (`ranks`), the
smallest number of a group is the document to keep. A *forest* is an array (members, 2) of int64 rows (root, member): each
group's smallest number beside each of its others, sorted by member. It is canonical: equal groups are equal bytes, however
they were found, so no result depends on order, partitions or workers.

The entries of one key must come together in one partition (`partition`); beyond that, tasks share nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

FIRST_ENTRY = np.dtype([("key", "<u8"), ("document", "<i8"), ("band", "<u2")])
"""A first key of a document: 18 bytes."""
ENTRY = np.dtype([("key", "<u8"), ("rest", "<u8"), ("document", "<i8")])
"""A full key of a document: 24 bytes."""

Forest = NDArray[np.int64]
FAN_IN = 16
"""Forests that are merged at one time: the tree of merges has this many branches."""


def first_entries(keys: NDArray[np.uint64], documents: NDArray[np.int64]) -> NDArray[Any]:
    """Entries of the first keys (documents, bands) that are not zero."""
    row, band = np.nonzero(keys)
    entries = np.empty(len(row), FIRST_ENTRY)
    entries["key"], entries["document"], entries["band"] = keys[row, band], documents[row], band
    return entries


def full_entries(keys: NDArray[Any], documents: NDArray[np.int64]) -> NDArray[Any]:
    """Entries of the full keys (documents, bands) of KEY that are not zero."""
    row, band = np.nonzero((keys["a"] != 0) | (keys["b"] != 0))
    entries = np.empty(len(row), ENTRY)
    found = keys[row, band]
    entries["key"], entries["rest"], entries["document"] = found["a"], found["b"], documents[row]
    return entries


def partition(entries: NDArray[Any], partitions: int) -> list[NDArray[Any]]:
    """The entries by the high bits of their key: equal keys lie in the part of the same number for every caller."""
    if not 1 <= partitions <= 1 << 16:
        raise ValueError(f"partitions={partitions}: allowed are 1 to 65536")
    part = (entries["key"] >> np.uint64(48)) * np.uint64(partitions) >> np.uint64(16)
    order = np.argsort(part, kind="stable")
    bounds = np.searchsorted(part[order], np.arange(partitions + 1))
    return [entries[order[bounds[i] : bounds[i + 1]]] for i in range(partitions)]


def _runs(entries: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """An order in which equal keys are neighbours, and where in it a new key begins."""
    key = entries["key"]
    order = np.argsort(key)
    ordered = key[order]
    new = np.ones(len(order), bool)
    new[1:] = ordered[1:] != ordered[:-1]
    if "rest" in (entries.dtype.names or ()):
        rest = entries["rest"][order]
        if (~new[1:] & (rest[1:] != rest[:-1])).any():  # keys that differ in their second half alone: hardly ever
            order = np.lexsort((entries["rest"], key))
            a, b = key[order], entries["rest"][order]
            new[1:] = (a[1:] != a[:-1]) | (b[1:] != b[:-1])
    return order, new


def shared(entries: NDArray[Any]) -> NDArray[Any]:
    """The entries of a partition whose key another document has too."""
    if len(entries) == 0:
        return entries
    order, new = _runs(entries)
    alone = new & np.append(new[1:], True)
    return entries[order[~alone]]


def wanted(found: Iterable[NDArray[Any]], documents: NDArray[np.int64], bands: int) -> NDArray[np.bool_]:
    """(documents, bands): which full keys the second pass must compute, from the shared entries of all partitions."""
    mask = np.zeros((len(documents), bands), bool)
    order = np.argsort(documents)
    ordered = documents[order]
    for entries in found:
        at = np.searchsorted(ordered, entries["document"])
        mine = at < len(ordered)
        mine[mine] = ordered[at[mine]] == entries["document"][mine]
        mask[order[at[mine]], entries["band"][mine]] = True
    return mask


def buckets(entries: NDArray[Any]) -> NDArray[np.int64]:
    """(members, 2) rows (bucket, document), sorted, of a partition's keys that at least two documents have."""
    if len(entries) == 0:
        return np.empty((0, 2), np.int64)
    order, new = _runs(entries)
    bucket = np.cumsum(new) - 1
    several = ~(new & np.append(new[1:], True))
    bucket, document = bucket[several], entries["document"][order[several]]
    order = np.lexsort((document, bucket))
    return np.stack([bucket[order], document[order]], 1)


def stars(members: NDArray[np.int64]) -> NDArray[np.int64]:
    """(edges, 2): each member of each bucket with the bucket's smallest document, so n − 1 edges for n members."""
    if len(members) == 0:
        return np.empty((0, 2), np.int64)
    new = np.ones(len(members), bool)
    new[1:] = members[1:, 0] != members[:-1, 0]
    first = np.flatnonzero(new)
    centre = members[first, 1][np.cumsum(new) - 1]
    return np.stack([centre[~new], members[~new, 1]], 1)


def forest(edges: NDArray[np.int64]) -> Forest:
    """The canonical forest of edges (edges, 2) between any numbers. Linear in the edges but for one sort of the numbers."""
    edges = edges[edges[:, 0] != edges[:, 1]]
    if len(edges) == 0:
        return np.empty((0, 2), np.int64)
    numbers, place = np.unique(edges, return_inverse=True)
    place = place.reshape(edges.shape)
    _, first, label = np.unique(components(len(numbers), place), return_index=True, return_inverse=True)
    root = numbers[first[label]]  # numbers ascend, so a component's first is its smallest
    member = root != numbers
    return np.stack([root[member], numbers[member]], 1)


def merge_forests(forests: Sequence[Forest]) -> Forest:
    """The forest of all groups of several, FAN_IN at a time; any order and nesting gives the same."""
    level = [f for f in forests if len(f)]
    while len(level) > FAN_IN:
        level = [forest(np.concatenate(level[i : i + FAN_IN])) for i in range(0, len(level), FAN_IN)]
    return forest(np.concatenate(level)) if level else np.empty((0, 2), np.int64)


def forest_of(entries: NDArray[Any]) -> Forest:
    """The forest of one partition's full entries."""
    return forest(stars(buckets(entries)))


def labels_of(found: Forest, documents: NDArray[np.int64]) -> NDArray[np.int64]:
    """(documents,) number of the root of each document's group; its own where it has none."""
    labels = documents.copy()
    if len(found):
        at = np.minimum(np.searchsorted(found[:, 1], documents), len(found) - 1)
        member = found[at, 1] == documents
        labels[member] = found[at[member], 0]
    return labels


def components(n: int, edges: NDArray[np.int64]) -> NDArray[np.int32]:
    """(n,) label of each row's connected component; edges are pairs of rows."""
    graph = coo_matrix((np.ones(len(edges), bool), (edges[:, 0], edges[:, 1])), shape=(n, n))
    labels: NDArray[np.int32] = connected_components(graph, directed=False)[1]
    return labels


def forest_of_keys(keys: NDArray[Any]) -> Forest:
    """The forest of full keys (documents, bands), documents numbered by row; a band at a time, so that no more than
    twice as many edges as documents exist at once. A band that joins nothing new costs one sort."""
    rows = np.arange(len(keys), dtype=np.int64)
    found: Forest = np.empty((0, 2), np.int64)
    labels = rows
    for band in range(keys.shape[1]):
        edges = stars(buckets(full_entries(keys[:, band : band + 1], rows)))
        edges = edges[labels[edges[:, 0]] != labels[edges[:, 1]]]
        if len(edges):
            found = forest(np.concatenate([found, edges]))
            labels = labels_of(found, rows)
    return found


def edges_of_keys(keys: NDArray[Any]) -> NDArray[np.int64]:
    """(edges, 2): rows whose key in some band is the same, each with the smallest of its bucket; zero keys have none."""
    rows = np.arange(len(keys), dtype=np.int64)
    return distinct_pairs(stars(buckets(full_entries(keys, rows))))[0]


def distinct_pairs(pairs: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The distinct rows of (pairs, 2), sorted, and which of them each row is (numpy's unique over rows is slower)."""
    if len(pairs) == 0:
        return pairs, np.zeros(0, np.int64)
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    ordered = pairs[order]
    new = np.ones(len(pairs), bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    which = np.empty(len(pairs), np.int64)
    which[order] = np.cumsum(new) - 1
    return ordered[new], which
