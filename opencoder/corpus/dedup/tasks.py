"""Fuzzy dedup as tasks over files: each `function(inputs, outputs, **parameters)`, pure, with plain JSON parameters.

`fuzzy_steps` lists all of them for a corpus of shards. Shard k is a Parquet file with a column `text` and a .npy file of
int64, one number per row: the document's place in the order of the keep rule (`ranks`), or −1 for a row that takes no part.
Parts of an existing corpus are shards like any other (their files numbered first); its signatures.parquet may stand for
all of them, unless true similarities are wanted. A task holds one row group of its shard's text, up to twice.

Entries travel in *bucketed files*: a .npy of entries, those of bucket 0 first, and a .npy index (buckets, 3) of uint64: where
each begins and ends, and the CRC-32 of its bytes. So a task writes two files however many tasks read from it, and a reader
takes its range alone and checks it. In the first pass documents go by their address (shard · 2³² + row), by which shared keys
find the way back to their shard; in the second by their number, so that the last forest's rows are (kept, dropped)."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from opencoder.errors import DataError

from .. import minhash
from ..minhash import Texts
from .curve import Recipe
from .existing import read_signatures
from .groups import FAN_IN, buckets, first_entries, forest_of, full_entries, merge_forests, partition, shared, wanted
from .keys import first_keys, full_keys
from .verify import checked_forest, similarity_of

MODULE = __name__
SHARD_SHIFT = 32


class Step(NamedTuple):
    """One task, by name, function and files; paths are relative to the work folder where another step writes them."""

    name: str
    function: str
    """module:function."""
    outputs: tuple[str, ...]
    """Suffixes: the step writes NAME.SUFFIX for each."""
    inputs: tuple[str, ...]
    """Files that the task reads whole."""
    ranged: tuple[str, ...]
    """Files of which it reads ranges, which it checks itself: no need to read them whole before it runs. The function gets
    these after `inputs`, in one list."""
    parameters: dict[str, Any]

    def files(self) -> tuple[str, ...]:
        """What it writes."""
        return tuple(f"{self.name}.{suffix}" for suffix in self.outputs)


def fuzzy_steps(
    shards: Sequence[tuple[str, str]],
    recipe: Recipe,
    *,
    partitions: int,
    check_jaccard: float | None = None,
    prefix: str = "fuzzy",
) -> list[Step]:
    """All steps for shards given as (texts, numbers), in an order in which they can run. The last one writes the forest of
    all near-duplicates, PREFIX/forest/merge-….npy with rows (kept, dropped)."""
    plain = recipe._asdict()
    steps: list[Step] = []

    def step(
        name: str, function: str, inputs: Sequence[str], ranged: Sequence[str] = (), **parameters: Any
    ) -> tuple[str, ...]:
        outputs = ("npy",) if name.startswith("forest/") else ("entries.npy", "index.npy")
        made = Step(f"{prefix}/{name}", f"{MODULE}:{function}", outputs, tuple(inputs), tuple(ranged), parameters)
        steps.append(made)
        return made.files()

    back: list[str] = []
    if recipe.progressive:
        firsts: list[str] = []
        for k, shard in enumerate(shards):
            firsts += step(f"first/{k:06d}", "first_task", shard, shard=k, recipe=plain, partitions=partitions)
        for p in range(partitions if shards else 0):
            back += step(f"shared/{p:06d}", "shared_task", (), firsts, part=p, shards=len(shards))
    fulls: list[str] = []
    for k, shard in enumerate(shards):
        fulls += step(f"full/{k:06d}", "full_task", shard, back, shard=k, recipe=plain, partitions=partitions)
    check: dict[str, Any] = {}
    if check_jaccard is not None:
        check = {"check_jaccard": check_jaccard, "ngram": recipe.ngram, "shards": len(shards)}
    sources = [path for shard in shards for path in shard] if check else []
    level: list[str] = []
    for p in range(partitions if shards else 0):
        level += step(f"forest/part-{p:06d}", "forest_task", sources, fulls, part=p, **check)
    depth = 0
    while depth == 0 or len(level) > 1:
        groups = [level[i : i + FAN_IN] for i in range(0, len(level), FAN_IN)] or [[]]
        level = [step(f"forest/merge-{depth}-{i:06d}", "merge_task", group)[0] for i, group in enumerate(groups)]
        depth += 1
    return steps


def first_task(inputs: list[Path], outputs: list[Path], *, shard: int, recipe: dict[str, Any], partitions: int) -> int:
    """(texts, numbers) → first entries of a shard by partition; returns how many."""
    rows = np.flatnonzero(np.load(inputs[1]) >= 0)
    made = Recipe(**recipe)
    if _is_stored(inputs[0]):
        keys = read_signatures(inputs[0], made)[1][rows]
    else:
        keys = _by_row_group(inputs[0], rows, lambda texts, _: first_keys(texts, made))
    entries = first_entries(keys, (np.int64(shard) << SHARD_SHIFT) + rows)
    write_buckets(outputs, partition(entries, partitions))
    return len(entries)


def shared_task(inputs: list[Path], outputs: list[Path], *, part: int, shards: int) -> int:
    """First entries of all shards → those of one partition that have company, by shard; returns how many."""
    found = shared(_gather(inputs, part))
    found = found[np.lexsort((found["band"], found["document"]))]
    bounds = np.searchsorted(found["document"], np.arange(shards + 1, dtype=np.int64) << SHARD_SHIFT)
    write_buckets(outputs, [found[bounds[k] : bounds[k + 1]] for k in range(shards)])
    return len(found)


def full_task(inputs: list[Path], outputs: list[Path], *, shard: int, recipe: dict[str, Any], partitions: int) -> int:
    """(texts, numbers, shared entries of all partitions) → full entries of a shard by partition; returns how many
    documents got keys. Without shared entries, all do."""
    made = Recipe(**recipe)
    numbers = np.load(inputs[1])
    rows, mask = np.flatnonzero(numbers >= 0), None
    if len(inputs) > 2:
        found = [_read_bucket(e, i, shard) for e, i in zip(inputs[2::2], inputs[3::2], strict=True)]
        mask = wanted(found, (np.int64(shard) << SHARD_SHIFT) + rows, made.bands)
        some = mask.any(axis=1)
        rows, mask = rows[some], mask[some]
    if _is_stored(inputs[0]):
        keys = read_signatures(inputs[0], made)[2][rows]
        if mask is not None:
            keys[~mask] = 0
    else:
        keys = _by_row_group(
            inputs[0], rows, lambda texts, here: full_keys(texts, made, None if mask is None else mask[here])
        )
    write_buckets(outputs, partition(full_entries(keys, numbers[rows]), partitions))
    return len(rows)


def forest_task(
    inputs: list[Path],
    outputs: list[Path],
    *,
    part: int,
    check_jaccard: float | None = None,
    ngram: int = 0,
    shards: int = 0,
) -> int:
    """Full entries of all shards → forest of one partition; returns its rows. With `check_jaccard`, the first 2·shards
    inputs are (texts, numbers) of each shard; the texts of the partition's candidates are then in memory at once."""
    sources = inputs[: 2 * shards]
    entries = _gather(inputs[len(sources) :], part)
    if check_jaccard is None:
        found = forest_of(entries)
    else:
        texts = _texts_of(sources, np.unique(buckets(entries)[:, 1]))
        similarity = similarity_of(lambda numbers: [texts[n] for n in numbers.tolist()], ngram)
        found = checked_forest(entries, similarity, check_jaccard)
    _save(outputs[0], found)
    return len(found)


def merge_task(inputs: list[Path], outputs: list[Path]) -> int:
    """Forests → the forest of all of them; returns its rows."""
    found = merge_forests([np.load(path) for path in inputs])
    _save(outputs[0], found)
    return len(found)


def write_buckets(outputs: Sequence[Path], parts: Sequence[NDArray[Any]]) -> None:
    """Write a bucketed file: (entries, index)."""
    ends = np.cumsum([len(part) for part in parts], dtype=np.uint64)
    sums = [zlib.crc32(np.ascontiguousarray(part).view(np.uint8).data) for part in parts]
    begins = np.concatenate([np.zeros(1, np.uint64), ends[:-1]])
    _save(outputs[0], np.concatenate(parts))
    _save(outputs[1], np.stack([begins, ends, np.array(sums, np.uint64)], 1))


def _read_bucket(entries: Path, index: Path, bucket: int) -> NDArray[Any]:
    """One bucket of a bucketed file. Raises DataError if its bytes are not those that were written."""
    try:
        begin, end, crc = np.load(index)[bucket].tolist()
        found = np.array(np.load(entries, mmap_mode="r")[begin:end]) if begin < end else _empty(entries)
        if len(found) == end - begin and zlib.crc32(found.view(np.uint8).data) == crc:
            return found
    except (ValueError, IndexError, EOFError):  # what numpy says of a file that is cut or no array at all
        pass
    raise DataError(f"{entries} is damaged (bucket {bucket}): remove it and start again, and it is made anew")


def _empty(entries: Path) -> NDArray[Any]:
    """No entries, of the kind that a file holds, from its header alone (a file without data cannot be mapped)."""
    with open(entries, "rb") as file:
        np.lib.format.read_magic(file)
        _, _, kind = np.lib.format.read_array_header_1_0(file)
    return np.empty(0, kind)


def _gather(inputs: Sequence[Path], bucket: int) -> NDArray[Any]:
    """One bucket of several bucketed files."""
    return np.concatenate([_read_bucket(e, i, bucket) for e, i in zip(inputs[::2], inputs[1::2], strict=True)])


def _is_stored(path: Path) -> bool:
    return "full" in pq.read_schema(path).names


def _by_row_group(path: Path, rows: NDArray[np.int64], keys_of: Callable[[Texts, slice], NDArray[Any]]) -> NDArray[Any]:
    """The keys of ascending rows of a shard, a row group of texts at a time."""
    found = [keys_of([], slice(0, 0))]
    with pq.ParquetFile(path) as file:
        starts = np.cumsum([0, *(file.metadata.row_group(g).num_rows for g in range(file.num_row_groups))])
        bounds = np.searchsorted(rows, starts)
        for g in np.flatnonzero(bounds[1:] > bounds[:-1]):
            here = slice(bounds[g], bounds[g + 1])
            column = file.read_row_group(g, columns=["text"])["text"]
            whole = bounds[g + 1] - bounds[g] == len(column)
            found.append(keys_of(column if whole else column.take(pa.array(rows[here] - starts[g])), here))
    return np.concatenate(found)


def _texts(path: Path, rows: NDArray[np.int64]) -> Texts:
    if _is_stored(path):
        raise DataError(f"{path} holds keys, no texts: give the parts of clean/ instead, or unset dedup.check_jaccard")
    column = pq.read_table(path, columns=["text"])["text"]
    return column if len(rows) == len(column) else column.take(pa.array(rows))


def _texts_of(sources: Sequence[Path], numbers: NDArray[np.int64]) -> dict[int, str]:
    """number → text, for numbers of any shard; each shard that holds one is read once."""
    found: dict[int, str] = {}
    for texts, of_rows in zip(sources[::2], sources[1::2], strict=True):
        here = np.load(of_rows)
        rows = np.flatnonzero(np.isin(here, numbers))
        if len(rows):
            found.update(zip(here[rows].tolist(), minhash.strings(_texts(texts, rows)), strict=True))
    return found


def _save(path: Path, array: NDArray[Any]) -> None:
    with open(path, "wb") as file:  # np.save would add .npy to another name
        np.save(file, array, allow_pickle=False)
