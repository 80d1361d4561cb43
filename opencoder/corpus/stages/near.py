"""How alike the near-duplicates of a shard are to what is kept in their place."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from .. import dedup
from .shards import texts_at

EXCERPTS = 20
"""Pairs of a shard whose texts the report may show side by side, the least similar first."""
EXCERPT_CHARS = 1500


def compare(near: pa.Table, texts: list[str], folder: Path, ngram: int) -> list[dict[str, Any]]:
    """The rows of a table of NEAR as dicts, with `jaccard` filled in where it is null, and EXCERPTS rows with excerpts.

    texts: of the whole shard; folder: where the other shards' files lie. The kept files are read in order, so a row group
    that holds some is read once. Memory: a row group of texts and EXCERPT_CHARS per row."""
    rows: list[dict[str, Any]] = near.to_pylist()
    unknown = sorted((r for r in rows if r["jaccard"] is None), key=lambda r: (r["kept_file"], r["kept_place"]))
    for file, some in groupby(unknown, key=lambda row: row["kept_file"]):
        same = list(some)
        for which, kept in texts_at(folder / file, np.array([row["kept_place"] for row in same], np.int64)):
            here = [same[i] for i in which.tolist()]
            _fill(here, [texts[row["place"]] for row in here], kept, ngram)
    shown = {row["place"] for row in sorted(unknown, key=lambda r: (r["jaccard"], r["place"]))[:EXCERPTS]}
    for row in unknown:
        if row["place"] not in shown:
            row |= {"excerpt": None, "kept_excerpt": None}
    return rows


def _fill(rows: list[dict[str, Any]], mine: list[str], kept: list[str], ngram: int) -> None:
    pairs = np.arange(2 * len(rows), dtype=np.int64).reshape(2, -1).T.copy()
    found = np.round(dedup.jaccard_of_pairs([*mine, *kept], pairs, ngram), 8)
    for row, value, a, b in zip(rows, found.tolist(), mine, kept, strict=True):
        row |= {"jaccard": value, "excerpt": a[:EXCERPT_CHARS], "kept_excerpt": b[:EXCERPT_CHARS]}
