"""Tasks of dedup around those of opencoder.corpus.dedup.tasks: `exact` numbers the surviving records in the order of the keep
rule, `groups` names what is dropped and for which record.

Memory, in bytes: exact about 400 per record of the corpus, groups about 100 per record and 2,000 per near-duplicate."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
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
from .shards import ShardTexts, starts_of, write_rows

EXACT = pa.schema([("number", pa.int64()), ("kept_id", pa.string()), ("kept_path", pa.string())])
"""One row per record. number: place in the keep rule among those that are left (of a repository, where that is the unit), -1
for the others. kept_id, kept_path: the file that it is a copy of."""
GROUPS = pa.schema(
    [("row", pa.int64()), ("path", pa.string()), ("kept_id", pa.string()), ("kept_path", pa.string()),
     ("jaccard", pa.float64()), ("excerpt", pa.string()), ("kept_excerpt", pa.string())]
)  # fmt: skip
"""One row per near-duplicate that is dropped, ascending."""
EXCERPTS = 20
"""Pairs whose texts the report may show side by side, the least similar first."""
EXCERPT_CHARS = 1500
NO_NUMBER = -1
UNITS = 16
"""Repositories whose texts are in memory at one time."""


class _Existing:
    """The files of corpora to dedup against, from the parts of their clean/ folders; numbered from 0, before all others."""

    def __init__(self, parts: Sequence[Path]) -> None:
        tables = [pq.read_table(part, columns=["id", "path"]) for part in parts]
        starts = np.cumsum([0, *map(len, tables)])
        self.numbers = [np.arange(a, b, dtype=np.int64) for a, b in itertools.pairwise(starts)]
        self.ids: list[str] = [i for table in tables for i in table["id"].to_pylist()]
        self.paths: list[str] = [p for table in tables for p in table["path"].to_pylist()]

    def exact(self, ids: list[str]) -> dict[int, int]:
        """row → number of the existing file with the same id."""
        known = {each: number for number, each in reversed(list(enumerate(self.ids)))}
        return {row: known[each] for row, each in enumerate(ids) if each in known}


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
    """Inputs: `shards` records without text, then the parts of existing corpora. Outputs: EXACT, and the numbers of each shard
    and of each entry of `known_parts`, how many parts an existing corpus has in it (.npy of int64), as opencoder.corpus.dedup.tasks
    needs them."""
    settings = CorpusConfig.model_validate(config)
    metas = [
        pq.read_table(p, columns=["status", "id", "path", "source", "repo", "stars", "commit_time"])
        for p in inputs[:shards]
    ]
    starts = np.cumsum([0, *map(len, metas)])
    table = pa.concat_tables(metas)
    rows, subset, units = _survivors(table, settings.dedup.level)
    dropped: dict[int, int] = {}
    if settings.dedup.exact:
        dropped = dedup.exact_duplicates(subset if units is None else units.table)
        dropped = dropped if units is None else units.spread(dropped)
    kept_id: list[str | None] = [None] * len(table)
    kept_path: list[str | None] = [None] * len(table)
    ids, paths = subset["id"].to_pylist(), subset["path"].to_pylist()
    for row, keep in dropped.items():
        at = int(rows[row])
        kept_id[at], kept_path[at] = ids[keep], paths[keep]
    known = _Existing(inputs[shards:])
    if settings.dedup.exact and known.ids:
        for row, copy_of in known.exact(ids).items():
            at = int(rows[row])
            kept_id[at], kept_path[at] = known.ids[copy_of], known.paths[copy_of]
    gone = np.array([value is not None for value in kept_id], bool)
    number = np.full(len(table), NO_NUMBER, np.int64)
    number[rows] = _numbers(subset, units, gone[rows], len(known.ids))
    columns = {"number": number, "kept_id": pa.array(kept_id, pa.string()),
               "kept_path": pa.array(kept_path, pa.string())}  # fmt: skip
    write_rows(outputs[0], columns, EXACT, starts.tolist())
    numbered = [number[begin:end] for begin, end in itertools.pairwise(starts)]
    parts = iter(known.numbers)
    together = [np.concatenate(list(itertools.islice(parts, n))) for n in known_parts]
    for path, array in zip(outputs[1:], [*numbered, *together], strict=True):
        with open(path, "wb") as file:  # np.save would add .npy to another name
            np.save(file, array)


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


def groups(inputs: list[Path], outputs: list[Path], *, shards: int, config: dict[str, Any]) -> None:
    """Inputs: the forest, EXACT, the records without text, the texts of all shards, parts of existing corpora. Output:
    GROUPS."""
    settings = CorpusConfig.model_validate(config)
    pairs, exact_file, metas = np.load(inputs[0]), inputs[1], inputs[2 : 2 + shards]
    texts, parts = inputs[2 + shards : 2 + 2 * shards], inputs[2 + 2 * shards :]
    known = _Existing(parts)
    count = len(known.ids)
    pairs = pairs[pairs[:, 1] >= count]
    rows_of = _rows_by_number(exact_file)
    sources = ShardTexts(
        [*parts, *texts], [*np.cumsum([0, *map(len, known.numbers)])[:-1], *(count + s for s in starts_of(exact_file))]
    )

    def fetch(numbers: NDArray[np.int64]) -> list[str]:
        return sources.of(np.where(numbers < count, numbers, count + rows_of[np.maximum(numbers - count, 0)]))

    similarity = np.round(dedup.similarity_of(fetch, settings.dedup.ngram)(pairs), 8)
    rows = rows_of[pairs[:, 1] - count]
    ids, paths = _names(metas)
    names: list[tuple[str, str, str]] = []
    for row, root in zip(rows.tolist(), pairs[:, 0].tolist(), strict=True):
        at = root if root < count else int(rows_of[root - count])
        kept = (known.ids[at], known.paths[at]) if root < count else (ids[at].as_py(), paths[at].as_py())
        names.append((paths[row].as_py(), *kept))
    _write_groups(
        outputs[0], rows, names, similarity, lambda chosen: (fetch(pairs[chosen, 1]), fetch(pairs[chosen, 0]))
    )


def _rows_by_number(exact_file: Path) -> NDArray[np.int64]:
    """Row of each number, from the smallest new one on."""
    numbers = pq.read_table(exact_file, columns=["number"])["number"].to_numpy()
    rows = np.flatnonzero(numbers != NO_NUMBER)
    found: NDArray[np.int64] = rows[np.argsort(numbers[rows], kind="stable")]
    return found


def _names(metas: Sequence[Path]) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    table = pa.concat_tables([pq.read_table(p, columns=["id", "path"]) for p in metas])
    return table["id"], table["path"]


def _write_groups(
    path: Path,
    rows: NDArray[np.int64],
    names: list[tuple[str, str, str]],
    similarity: NDArray[np.float64],
    excerpts_of: Callable[[NDArray[np.int64]], tuple[list[str], list[str]]],
) -> None:
    """GROUPS, sorted, with excerpts of the least similar pairs. `names`: path, kept id, kept path of each row."""
    shown = np.lexsort((rows, similarity))[:EXCERPTS]
    excerpts: dict[int, tuple[str, str]] = {}
    for at in shown.tolist():  # one at a time: each call sorts out its own numbers
        mine, theirs = excerpts_of(np.array([at]))
        excerpts[at] = (mine[0][:EXCERPT_CHARS], theirs[0][:EXCERPT_CHARS])
    order = np.argsort(rows, kind="stable").tolist()
    columns = {
        "row": pa.array([int(rows[i]) for i in order], pa.int64()),
        "path": pa.array([names[i][0] for i in order], pa.string()),
        "kept_id": pa.array([names[i][1] for i in order], pa.string()),
        "kept_path": pa.array([names[i][2] for i in order], pa.string()),
        "jaccard": pa.array([float(similarity[i]) for i in order], pa.float64()),
        "excerpt": pa.array([excerpts.get(i, (None, None))[0] for i in order], pa.string()),
        "kept_excerpt": pa.array([excerpts.get(i, (None, None))[1] for i in order], pa.string()),
    }
    pq.write_table(pa.table(columns, schema=GROUPS), path, compression="zstd")


# ---- near-duplicates, repository by repository ----


def repository_groups(inputs: list[Path], outputs: list[Path], *, shards: int, config: dict[str, Any]) -> None:
    """Inputs: EXACT, the records without text and the texts of all shards. Output: GROUPS. One task: for the ablation."""
    settings = CorpusConfig.model_validate(config)
    recipe = dedup.recipe_of(settings.dedup)
    numbers = pq.read_table(inputs[0], columns=["number"])["number"].to_numpy()
    metas = inputs[1 : 1 + shards]
    texts = ShardTexts(inputs[1 + shards :], starts_of(inputs[0]))
    table = pa.concat_tables([pq.read_table(p, columns=["path", "source", "id"]) for p in metas])
    alive = np.flatnonzero(numbers != NO_NUMBER)
    path, source, ids = (table[name].take(pa.array(alive)).to_pylist() for name in ("path", "source", "id"))
    order = sorted(range(len(alive)), key=lambda i: (numbers[alive[i]], path[i].encode(), source[i].encode(), ids[i]))
    files: dict[int, list[int]] = {}
    for i in order:
        files.setdefault(int(numbers[alive[i]]), []).append(int(alive[i]))

    def text_of(number: int) -> str:
        return dedup.repository_text(texts.of(np.array(files[number], np.int64)))

    def fetch(wanted: NDArray[np.int64]) -> list[str]:
        return [text_of(number) for number in wanted.tolist()]

    known = np.array(sorted(files), np.int64)
    parts = [known[i : i + UNITS] for i in range(0, len(known), UNITS)]
    batches = [dedup.Batch(part, partial(fetch, part)) for part in parts]
    pairs = dedup.near_duplicates(batches, recipe, check_jaccard=settings.dedup.check_jaccard)
    similarity = np.round(dedup.similarity_of(fetch, settings.dedup.ngram)(pairs), 8)
    by_row = dict(zip(alive.tolist(), zip(ids, path, strict=True), strict=True))
    rows, names, values, of = [], [], [], []
    for i, (root, member) in enumerate(pairs.tolist()):
        for row in files[member]:
            rows.append(row)
            names.append((by_row[row][1], *by_row[files[root][0]]))
            values.append(similarity[i])
            of.append(i)
    _write_groups(
        outputs[0], np.array(rows, np.int64), names, np.array(values, np.float64),
        lambda chosen: (fetch(pairs[[of[c] for c in chosen], 1]), fetch(pairs[[of[c] for c in chosen], 0])),
    )  # fmt: skip


def no_groups(inputs: list[Path], outputs: list[Path]) -> None:
    """GROUPS where fuzzy dedup is off."""
    pq.write_table(GROUPS.empty_table(), outputs[0])


# ---- licences of repositories ----


def licences(inputs: list[Path], outputs: list[Path]) -> None:
    """Inputs: the licence files of all shards. Output: {repository: {folder: licence expression}} in JSON."""
    from ..transform.licence import RepositoryLicences

    files: dict[str, list[tuple[str, str]]] = {}
    for path in inputs:
        for source, repo, name, text in json.loads(path.read_text(encoding="utf-8")):
            files.setdefault(repository_key(source, repo), []).append((name, text))
    found = {key: RepositoryLicences(some).folders for key, some in sorted(files.items())}
    outputs[0].write_text(json.dumps(found, sort_keys=True), encoding="utf-8")


def repository_key(source: str, repo: str | None) -> str:
    """What licence files hold for: a repository, or the whole input where none is known."""
    return f"{source}\0{repo or ''}"
