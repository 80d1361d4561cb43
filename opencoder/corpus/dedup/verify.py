"""The exact check of candidates: an edge stays only if the true Jaccard similarity of the two shingle sets reaches a
threshold.

A bucket's best document leads it: every other member is compared with the leader. Those who fail form a bucket of their
own with the next best as leader, ROUNDS times at most, so that one odd leader does not part true duplicates; members left
over then stay apart. Documents must be numbered in the order of the keep rule: a leader is then the same document whatever
the order of the rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import minhash
from ..minhash import Texts
from .groups import Forest, buckets, distinct_pairs, forest, stars

ROUNDS = 8
"""Leaders that a bucket has at most."""
PAIR_BATCH = 1024
"""Pairs whose texts are in memory at one time."""

Similarity = Callable[[NDArray[np.int64]], NDArray[np.float64]]
"""(pairs, 2) of document numbers → their true similarities."""


def jaccard(a: str, b: str, ngram: int) -> float:
    """True similarity of the shingle sets of two texts; 1 if neither has any."""
    x, y = minhash.shingles(a, ngram), minhash.shingles(b, ngram)
    return len(x & y) / len(x | y) if x or y else 1.0


def jaccard_of_pairs(texts: Texts, pairs: NDArray[np.int64], ngram: int) -> NDArray[np.float64]:
    """(pairs,) true similarities of pairs (pairs, 2) of rows of `texts`."""
    engine = minhash._engine()
    if engine is not None:
        found: NDArray[np.float64] = engine.jaccard_pairs(minhash.engine_texts(texts), pairs.reshape(-1, 2), ngram)
        return found
    sets = [minhash.shingles(text, ngram) for text in minhash.strings(texts)]
    both = [(sets[x], sets[y]) for x, y in pairs.tolist()]
    return np.array([len(x & y) / len(x | y) if x or y else 1.0 for x, y in both], np.float64)


def similarity_of(fetch: Callable[[NDArray[np.int64]], Texts], ngram: int) -> Similarity:
    """A Similarity over texts that `fetch(numbers)` brings, those of at most PAIR_BATCH pairs at a time."""

    def similarity(pairs: NDArray[np.int64]) -> NDArray[np.float64]:
        found = np.empty(len(pairs), np.float64)
        order = np.lexsort((pairs[:, 1], pairs[:, 0]))  # the pairs of one leader together: its text is fetched once
        for start in range(0, len(order), PAIR_BATCH):
            rows = order[start : start + PAIR_BATCH]
            numbers, place = np.unique(pairs[rows], return_inverse=True)
            found[rows] = jaccard_of_pairs(fetch(numbers), place.reshape(-1, 2).astype(np.int64), ngram)
        return found

    return similarity


def checked_forest(entries: NDArray[Any], similarity: Similarity, least: float) -> Forest:
    """The forest of one partition's full entries over edges whose true similarity is at least `least`."""
    members = buckets(entries)
    edges = [np.empty((0, 2), np.int64)]
    for _ in range(ROUNDS):
        pairs = stars(members)
        if len(pairs) == 0:
            break
        distinct, which = distinct_pairs(pairs)  # a pair may share several bands
        passed = (similarity(distinct) >= least)[which]
        edges.append(pairs[passed])
        new = np.ones(len(members), bool)
        new[1:] = members[1:, 0] != members[:-1, 0]
        members = members[~new][~passed]
    return forest(np.concatenate(edges))
