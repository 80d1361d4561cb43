"""Packing whole conversations into rows of fixed length.

Conversations are shuffled and taken by windows; within a window the longest comes first, and each goes into the fullest row that
still has room (best fit decreasing). Then the rows of the epoch are shuffled. All of it depends on the lengths and the seed alone."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Rows(NamedTuple):
    """Which conversations each row holds, epoch after epoch."""

    items: NDArray[np.int32]
    """Conversations, row by row."""
    bounds: NDArray[np.int64]
    """(rows + 1,) places in `items` where rows begin."""
    epochs: NDArray[np.int64]
    """Rows up to the end of each epoch."""


def best_fit(lengths: NDArray[np.integer], capacity: int) -> list[list[int]]:
    """Places in `lengths` by row; each row's sum is at most `capacity`, which no length exceeds."""
    rows: list[list[int]] = []
    by_space: defaultdict[int, list[int]] = defaultdict(list)
    spaces = 0
    """Bit s is set where a row has s places left: the lowest one not below a length is found by shifts."""
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist()
    sizes = lengths.tolist()
    for item in order:
        length = sizes[item]
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = by_space[space].pop()
            if not by_space[space]:
                spaces ^= 1 << space
            rows[row].append(item)
        else:
            space, row = capacity, len(rows)
            rows.append([item])
        left = space - length
        if left:
            by_space[left].append(row)
            spaces |= 1 << left
    return rows


def _epoch(
    lengths: NDArray[np.integer], capacity: int, window: int, pack: bool, random: np.random.RandomState
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Conversations row by row, and how many are in each row."""
    order = random.permutation(len(lengths)).astype(np.int32)
    if not pack:
        return order, np.ones(len(order), np.int64)
    rows = []
    for begin in range(0, len(order), window):
        part = order[begin : begin + window]
        rows += [part[row] for row in best_fit(lengths[part], capacity)]
    shuffled = [rows[i] for i in random.permutation(len(rows))]
    return np.concatenate(shuffled), np.array([len(row) for row in shuffled], np.int64)


def pack_rows(
    lengths: NDArray[np.integer],
    capacity: int,
    *,
    seed: int,
    window: int,
    epochs: int | None = None,
    num_rows: int = 0,
    pack: bool = True,
) -> Rows:
    """Rows of `epochs` epochs, or of as many as give `num_rows`. lengths (conversations,), at least one, of 1 to `capacity`.
    Without `pack` a row holds one conversation."""
    random = np.random.RandomState(seed)
    items, counts, ends = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)], [0]
    while len(ends) <= epochs if epochs is not None else ends[-1] < num_rows:
        conversations, per_row = _epoch(lengths, capacity, window, pack, random)
        items.append(conversations)
        counts.append(per_row)
        ends.append(ends[-1] + len(counts[-1]))
    bounds = np.zeros(ends[-1] + 1, np.int64)
    np.cumsum(np.concatenate(counts), out=bounds[1:])
    return Rows(np.concatenate(items), bounds, np.array(ends[1:], np.int64))


def efficiency(lengths: NDArray[np.integer], rows: Rows, capacity: int) -> float:
    """Share of the rows' places that hold a conversation; 0 if there is no row."""
    n = len(rows.bounds) - 1
    return float(lengths[rows.items].sum(dtype=np.int64)) / (n * capacity) if n else 0.0
