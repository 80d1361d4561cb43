"""The steps of fuzzy dedup in one process, over batches of documents whose texts are asked for again when needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import minhash
from ..minhash import Texts
from .curve import Recipe
from .groups import (
    Forest,
    edges_of_keys,
    first_entries,
    forest_of,
    full_entries,
    merge_forests,
    partition,
    shared,
    wanted,
)
from .keys import band_keys, first_keys, full_keys
from .verify import checked_forest, similarity_of


class Batch(NamedTuple):
    """Documents that are worked on together."""

    numbers: NDArray[np.int64]
    """Unique over all batches."""
    texts: Callable[[], Texts]
    """Brings the texts, the same each time."""


def lsh_edges(signatures: NDArray[Any], bands: int, rows: int) -> NDArray[np.int64]:
    """(edges, 2): rows that agree in a whole band. All-max rows have none."""
    return edges_of_keys(band_keys(signatures, bands, rows))


def near_duplicates(
    batches: Sequence[Batch],
    recipe: Recipe,
    *,
    check_jaccard: float | None = None,
    partitions: int = 1,
    progressive: bool | None = None,
) -> Forest:
    """The forest of near-duplicates over all batches.

    With numbers in the order of the keep rule (`ranks`), the rows of the answer are (kept, dropped). `progressive` None
    means as the recipe says; both ways give the same forest. The texts of one batch are in memory at a time; with
    `check_jaccard`, those of PAIR_BATCH pairs as well."""
    if progressive is None:
        progressive = recipe.progressive
    masks: list[NDArray[np.bool_] | None] = [None] * len(batches)
    if progressive:
        firsts = [
            partition(first_entries(first_keys(batch.texts(), recipe), batch.numbers), partitions) for batch in batches
        ]
        found = [shared(np.concatenate(part)) for part in zip(*firsts, strict=True)]
        masks = [wanted(found, batch.numbers, recipe.bands) for batch in batches]
    fulls = []
    for batch, mask in zip(batches, masks, strict=True):
        some = np.arange(len(batch.numbers)) if mask is None else np.flatnonzero(mask.any(axis=1))
        keys = _full(batch, some, recipe, mask)
        fulls.append(partition(full_entries(keys, batch.numbers[some]), partitions))
    parts = [np.concatenate(part) for part in zip(*fulls, strict=True)]
    if check_jaccard is None:
        return merge_forests([forest_of(part) for part in parts])
    similarity = similarity_of(_fetcher(batches), recipe.ngram)
    return merge_forests([checked_forest(part, similarity, check_jaccard) for part in parts])


def _full(batch: Batch, some: NDArray[np.int64], recipe: Recipe, mask: NDArray[np.bool_] | None) -> NDArray[Any]:
    """Full keys of some rows of a batch, whose texts are not fetched where there is none."""
    if mask is None:
        return full_keys(batch.texts(), recipe)
    if len(some) == 0:
        return full_keys([], recipe)
    return full_keys(_take(batch.texts(), some), recipe, mask[some])


def _take(texts: Texts, rows: NDArray[np.int64]) -> Texts:
    if isinstance(texts, Sequence):
        return [texts[row] for row in rows]
    return texts.take(rows)


def _fetcher(batches: Sequence[Batch]) -> Callable[[NDArray[np.int64]], Texts]:
    """numbers (ascending) → their texts, reading each batch that holds one of them once."""

    def fetch(numbers: NDArray[np.int64]) -> Texts:
        found: dict[int, str] = {}
        for batch in batches:
            rows = np.flatnonzero(np.isin(batch.numbers, numbers))
            if len(rows):
                texts = minhash.strings(_take(batch.texts(), rows))
                found.update(zip(batch.numbers[rows].tolist(), texts, strict=True))
        return [found[number] for number in numbers.tolist()]

    return fetch
