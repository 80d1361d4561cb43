"""Tasks of dedup around those of opencoder.corpus.dedup.tasks: `exact` numbers the surviving records in the order of the keep
rule, `groups` names what is dropped and for which record.

Memory, in bytes: exact about 400 per record of the corpus, groups about 200 per record and 500 per near-duplicate."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from opencoder.corpus_config import CorpusConfig

from .. import dedup
from .near import EXCERPTS, PAIR_CHARS
from .shards import COPIES, NEAR, ShardTexts, write_by_shard

NO_NUMBER = -1
UNITS = 16
"""Repositories whose texts are in memory at one time."""


class _Survivors(NamedTuple):
    """Records that reading left, and what one document is."""

    rows: NDArray[np.int64]
    table: pa.Table
    units: dedup.Units | None
    """Repositories, where those are compared."""


def _survivors(table: pa.Table, level: str) -> _Survivors:
    rows = np.flatnonzero(pc.equal(table["status"], "kept").to_numpy(zero_copy_only=False)).astype(np.int64)
    subset = table.take(pa.array(rows)).append_column("key", table["source"].take(pa.array(rows)))
    return _Survivors(rows, subset, dedup.repositories(subset) if level == "repository" else None)


def exact(
    inputs: list[Path], outputs: list[Path], *, shards: int, known_parts: list[int], config: dict[str, Any]
) -> None:
    """Inputs: `shards` records without text, then the parts of existing corpora. Outputs: COPIES of each shard; the numbers of
    each shard and of each entry of `known_parts`, how many parts an existing corpus has in it (.npy of int64), as
    opencoder.corpus.dedup.tasks needs them: places in the keep rule of the files (or repositories) that are left, NO_NUMBER
    for the others."""
    settings = CorpusConfig.model_validate(config)
    metas = [
        pq.read_table(p, columns=["status", "id", "path", "source", "repo", "stars", "commit_time"])
        for p in inputs[:shards]
    ]
    starts = np.cumsum([0, *map(len, metas)])
    rows, subset, units = _survivors(pa.concat_tables(metas), settings.dedup.level)
    del metas
    known = dedup.read_existing(inputs[shards:])
    count = len(known.ids)
    # Of each row the file that it is a copy of: its place in `subset`, after those of the existing corpora; else NO_NUMBER.
    copy_of = np.full(len(subset), NO_NUMBER, np.int64)
    if settings.dedup.exact:
        copy_of = _copies(subset, units, count)
        if count:
            first = pc.index_in(subset["id"], value_set=known.ids.combine_chunks()).fill_null(NO_NUMBER).to_numpy()
            copy_of = np.where(first >= 0, first, copy_of)
    gone = copy_of != NO_NUMBER
    of = pa.array(copy_of[gone])
    names = {"kept_id": "id", "kept_path": "path"}
    both = {"id": known.ids, "path": known.paths}
    columns = {
        name: pa.chunked_array([*both[column].chunks, *subset[column].chunks], pa.string()).take(of)
        for name, column in names.items()
    }
    write_by_shard(outputs[:shards], rows[gone], columns, COPIES, starts)
    number = np.full(starts[-1], NO_NUMBER, np.int64)
    number[rows] = _numbers(subset, units, gone, count)
    numbered = [number[begin:end] for begin, end in itertools.pairwise(starts)]
    bounds = known.starts[np.cumsum([0, *known_parts])]
    together = [np.arange(begin, end, dtype=np.int64) for begin, end in itertools.pairwise(bounds)]
    for path, array in zip(outputs[shards:], [*numbered, *together], strict=True):
        with open(path, "wb") as file:  # np.save would add .npy to another name
            np.save(file, array)


def _copies(subset: pa.Table, units: dedup.Units | None, begin: int) -> NDArray[np.int64]:
    """(rows,) the place of the file that each is a copy of, counted from `begin`; NO_NUMBER for those that stay."""
    if units is None:
        kept = dedup.exact_kept(subset)
        return np.where(kept != np.arange(len(kept)), kept + begin, NO_NUMBER)
    found = np.full(len(subset), NO_NUMBER, np.int64)
    for row, kept_row in units.spread(dedup.exact_duplicates(units.table)).items():
        found[row] = kept_row + begin
    return found


def _numbers(subset: pa.Table, units: dedup.Units | None, gone: NDArray[np.bool_], begin: int) -> NDArray[np.int64]:
    """(rows,) number of each record that is left, from `begin` on; of a repository's files the repository's."""
    numbers = np.full(len(subset), NO_NUMBER, np.int64)
    if units is None:
        left = np.flatnonzero(~gone)
        numbers[left] = dedup.ranks(subset.take(pa.array(left))) + begin
        return numbers
    alive = [i for i, files in enumerate(units.rows) if not gone[files].all()]
    for rank, unit in zip(dedup.ranks(units.table.take(pa.array(alive, pa.int64()))), alive, strict=True):
        numbers[units.rows[unit]] = rank + begin
    numbers[gone] = NO_NUMBER
    return numbers


# ---- near-duplicates, file by file ----


def groups(inputs: list[Path], outputs: list[Path], *, shards: int) -> None:
    """Inputs: the forest, the numbers of all shards, the records without text, parts of existing corpora. Outputs: NEAR of
    each shard, without similarities."""
    pairs = np.load(inputs[0])
    numbers = [np.load(path) for path in inputs[1 : 1 + shards]]
    starts = np.cumsum([0, *map(len, numbers)])
    known = dedup.read_existing(inputs[1 + 2 * shards :])
    count = len(known.ids)
    pairs = pairs[pairs[:, 1] >= count]
    rows_of = _rows_by_number(np.concatenate([np.empty(0, np.int64), *numbers]))
    rows = rows_of[pairs[:, 1] - count]
    order = np.argsort(rows, kind="stable")
    roots = pairs[order, 0]
    # Files of existing corpora come first, those of this build after them.
    kept = np.where(roots < count, roots, count + rows_of[np.maximum(roots - count, 0)])
    files = [*(str(part) for part in known.parts), *(f"{n:06d}.parquet" for n in range(shards))]
    begins = np.array([*known.starts[:-1].tolist(), *(count + starts[:-1]).tolist()], np.int64)
    which = np.searchsorted(begins, kept, "right") - 1
    metas = [pq.read_table(p, columns=["id", "path"]) for p in inputs[1 + shards : 1 + 2 * shards]]
    columns = {
        name: pa.chunked_array([*of_known.chunks, *(c for t in metas for c in t[column].chunks)], pa.string())
        for name, column, of_known in (("kept_id", "id", known.ids), ("kept_path", "path", known.paths))
    }
    found: dict[str, Any] = {name: column.take(pa.array(kept)) for name, column in columns.items()}
    found |= {"kept_file": pa.array(files, pa.string()).take(pa.array(which)), "kept_place": kept - begins[which]}
    found |= {name: pa.nulls(len(kept), NEAR.field(name).type) for name in ("jaccard", "excerpt", "kept_excerpt")}
    write_by_shard(outputs, rows[order], found, NEAR, starts)


def _rows_by_number(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Row of each number, from the smallest new one on."""
    rows = np.flatnonzero(numbers != NO_NUMBER)
    found: NDArray[np.int64] = rows[np.argsort(numbers[rows], kind="stable")]
    return found


# ---- near-duplicates, repository by repository ----


def repository_groups(inputs: list[Path], outputs: list[Path], *, shards: int, config: dict[str, Any]) -> None:
    """Inputs: the numbers, the records without text and the texts of all shards. Outputs: NEAR of each shard. One task: for
    the ablation."""
    settings = CorpusConfig.model_validate(config)
    recipe = dedup.recipe_of(settings.dedup)
    parts = [np.load(path) for path in inputs[:shards]]
    numbers = np.concatenate([np.empty(0, np.int64), *parts])
    starts = np.cumsum([0, *map(len, parts)])
    table = pa.concat_tables([pq.read_table(p, columns=["path", "source", "id"]) for p in inputs[shards : 2 * shards]])
    texts = ShardTexts(inputs[2 * shards :], starts[:-1].tolist())
    files = _files_of_units(numbers, table)

    def fetch(wanted: NDArray[np.int64]) -> list[str]:
        return [dedup.repository_text(texts.of(np.array(files[number], np.int64))) for number in wanted.tolist()]

    units = np.array(sorted(files), np.int64)
    batches = [
        dedup.Batch(units[i : i + UNITS], partial(fetch, units[i : i + UNITS])) for i in range(0, len(units), UNITS)
    ]
    pairs = dedup.near_duplicates(batches, recipe, check_jaccard=settings.dedup.check_jaccard)
    similarity = np.round(dedup.similarity_of(fetch, settings.dedup.ngram)(pairs), 8)
    shown = set(np.lexsort((pairs[:, 1], similarity))[:EXCERPTS].tolist())
    found: list[tuple[Any, ...]] = []
    for i, (root, member) in enumerate(pairs.tolist()):
        excerpts = [text[: 2 * PAIR_CHARS] for text in fetch(np.array([member, root]))] if i in shown else [None, None]
        for row in files[member]:
            found.append((row, files[root][0], similarity[i], *excerpts))
            excerpts = [None, None]  # once for a repository
    found.sort(key=lambda one: one[0])
    rows, kept, values, mine, theirs = zip(*found, strict=True) if found else ((),) * 5
    at = np.array(kept, np.int64)
    shard = np.searchsorted(starts, at, "right") - 1
    columns = {
        "kept_id": table["id"].take(pa.array(at)), "kept_path": table["path"].take(pa.array(at)),
        "kept_file": pa.array([f"{n:06d}.parquet" for n in shard.tolist()], pa.string()), "kept_place": at - starts[shard],
        "jaccard": pa.array(values, pa.float64()), "excerpt": pa.array(mine, pa.string()),
        "kept_excerpt": pa.array(theirs, pa.string()),
    }  # fmt: skip
    write_by_shard(outputs, np.array(rows, np.int64), columns, NEAR, starts)


def _files_of_units(numbers: NDArray[np.int64], table: pa.Table) -> dict[int, list[int]]:
    """number of a repository → the rows of its files, in the order of their paths."""
    alive = np.flatnonzero(numbers != NO_NUMBER)
    path, source, ids = (table[name].take(pa.array(alive)).to_pylist() for name in ("path", "source", "id"))
    order = sorted(range(len(alive)), key=lambda i: (numbers[alive[i]], path[i].encode(), source[i].encode(), ids[i]))
    files: dict[int, list[int]] = {}
    for i in order:
        files.setdefault(int(numbers[alive[i]]), []).append(int(alive[i]))
    return files


def no_groups(inputs: list[Path], outputs: list[Path]) -> None:
    """NEAR of each shard where fuzzy dedup is off."""
    for path in outputs:
        pq.write_table(NEAR.empty_table(), path)
