"""How alike the near-duplicates of a shard are to what is kept in their place."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from .. import dedup
from .shards import texts_at

EXCERPTS = 20
"""Pairs of a shard whose texts the report may show side by side, the least similar first."""
PAIR_CHARS = 1500
"""Characters of each that are shown; the excerpts here are twice as long, for their ends are not."""


def compare(rows: list[dict[str, Any]], texts: list[str], folder: Path, ngram: int) -> None:
    """Fill in `jaccard` and the excerpts of rows of NEAR where they are null. texts: of the rows; folder: where the files of
    other shards lie. The kept files are read in order, so a row group that holds some is read once. Memory: a row group."""
    order = sorted(
        (i for i, row in enumerate(rows) if row["jaccard"] is None),
        key=lambda i: (rows[i]["kept_file"], rows[i]["kept_place"]),
    )
    for file, some in groupby(order, key=lambda i: rows[i]["kept_file"]):
        same = list(some)
        for which, kept in texts_at(folder / file, np.array([rows[i]["kept_place"] for i in same], np.int64)):
            here = [same[k] for k in which.tolist()]
            _fill([rows[i] for i in here], [texts[i] for i in here], kept, ngram)


def examples(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The EXCERPTS least similar of the rows that have excerpts."""
    found = [row for row in rows if row["excerpt"] is not None]
    return sorted(found, key=lambda row: (row["jaccard"], row["place"]))[:EXCERPTS]


def _fill(rows: list[dict[str, Any]], mine: list[str], kept: list[str], ngram: int) -> None:
    pairs = np.arange(2 * len(rows), dtype=np.int64).reshape(2, -1).T.copy()
    found = np.round(dedup.jaccard_of_pairs([*mine, *kept], pairs, ngram), 8)
    for row, value, a, b in zip(rows, found.tolist(), mine, kept, strict=True):
        row |= {"jaccard": value, "excerpt": a[: 2 * PAIR_CHARS], "kept_excerpt": b[: 2 * PAIR_CHARS]}
