"""Sample and blending indices: C++ (csrc/text/sample_index.cpp), or numpy and Python with the same result.

Golden vectors: tests/data/test_index.py."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from opencoder.native import text_engine


def build_sample_index(
    sizes: NDArray[np.int32], document_index: NDArray[np.int32], *, seq_len: int, num_samples: int, extra: int = 1
) -> NDArray[Any]:
    """(num_samples + 1, 2): position in `document_index` and token offset there of each sample's first token.

    sizes (sequences,) in tokens. Neighbouring samples share `extra` tokens. int32, or int64 where it would not fit.
    Raises ValueError if the documents hold fewer tokens than the samples need."""
    wide = max(len(document_index), int(sizes.max(initial=0))) > np.iinfo(np.int32).max
    engine = text_engine()
    try:
        if engine is not None:
            build = engine.sample_index_int64 if wide else engine.sample_index_int32
            index: NDArray[Any] = build(sizes, document_index, seq_len, num_samples, extra)
            return index
        return _sample_index(sizes, document_index, seq_len, num_samples, extra).astype(np.int64 if wide else np.int32)
    except IndexError as error:
        raise ValueError(f"sample index: {error}") from error


def _sample_index(
    sizes: NDArray[np.int32], document_index: NDArray[np.int32], seq_len: int, num_samples: int, extra: int
) -> NDArray[np.int64]:
    """All samples start at multiples of seq_len in the concatenated documents, so a search finds their places.

    A start on a border belongs to the document that ends there (offset = its length) if a token is shared, because the
    sample before it took its extra token from that document; without, the walk stops in the same place."""
    lengths = sizes[document_index].astype(np.int64)
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    # The end of sample k-1, extra token included, decides where row k points.
    stops = np.arange(1, num_samples + 1, dtype=np.int64) * seq_len + extra
    short = stops > total
    if short[:-1].any() or (num_samples and not len(ends)):
        raise IndexError("the documents hold fewer tokens than the samples need")
    position = np.searchsorted(ends, np.minimum(stops, total), side="left")
    if num_samples and short[-1]:
        position[-1] = len(ends) - 1
    offset = stops - extra - (ends[position] - lengths[position])
    if num_samples and short[-1]:
        offset[-1] = lengths[-1] - extra
    return np.concatenate([np.zeros((1, 2), np.int64), np.stack([position, offset], 1)])


def build_blending_indices(weights: NDArray[np.float64], size: int) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    """Which member gives sample t, and which of its samples that is; weights must sum to 1. At most 32,767 members."""
    if len(weights) > np.iinfo(np.int16).max:
        raise ValueError(f"a blend has {len(weights)} members; allowed: {np.iinfo(np.int16).max}")
    engine = text_engine()
    if engine is not None:
        dataset, sample = engine.blending(weights, size)
        return dataset, sample
    dataset, sample = np.empty(size, np.int16), np.empty(size, np.int64)
    count = np.zeros(len(weights), np.int64)
    for t in range(size):
        best = int(np.argmax(weights * max(t, 1) - count))
        dataset[t], sample[t] = best, count[best]
        count[best] += 1
    return dataset, sample


def build_exhaustive_blending_indices(sizes: NDArray[np.int64]) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    """Every sample of every member once, in proportion to the members' sizes."""
    engine = text_engine()
    if engine is not None:
        dataset, sample = engine.exhaustive_blending(sizes)
        return dataset, sample
    total = int(sizes.sum())
    weights = sizes / total
    dataset, sample = np.empty(total, np.int16), np.empty(total, np.int64)
    count = np.zeros(len(sizes), np.int64)
    for t in range(total):
        error = np.where(count < sizes, weights * max(t, 1) - count, -np.inf)
        best = int(np.argmax(error))
        dataset[t], sample[t] = best, count[best]
        count[best] += 1
    return dataset, sample
