"""Which groups of the data a token belongs to: the dataset it is from, and the language of its document.

The language comes from PREFIX.docs.parquet. It is read once and kept as small numbers beside the sample index, where all
processes map it; a dataset without that file, and a document without a language, belong to no language."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from opencoder.errors import DataError

from .cache import IndexCache, cache_folder
from .indexed import IndexedDataset

NONE = -1
"""Number of no group."""


class Languages(NamedTuple):
    """The language of each sequence of a dataset."""

    codes: NDArray[np.int16]
    """(sequences,) places in `names`, or NONE."""
    names: list[str]


class GroupNames(NamedTuple):
    """The groups of a blend, numbered through: its datasets, then the languages in them."""

    sources: list[str]
    """PREFIX of each dataset, once."""
    languages: list[str]

    def __len__(self) -> int:
        return len(self.sources) + len(self.languages)


@dataclass(frozen=True)
class Groups:
    """The numbers that tokens of one dataset get."""

    source: int
    codes: NDArray[np.int16] | None
    """As in `Languages`; None: no language is known."""
    numbers: NDArray[np.int16]
    """Number of the group for each code, and NONE at the end, where a code of NONE points."""

    def of(self, documents: Sequence[int], lengths: Sequence[int]) -> NDArray[np.int16]:
        """(tokens, 2) source and language of every token, for pieces of documents of some lengths one after another."""
        found = np.full((sum(lengths), 2), NONE, np.int16)
        found[:, 0] = self.source
        if self.codes is not None:
            found[:, 1] = np.repeat(self.numbers[self.codes[documents]], lengths)
        return found


def read_languages(data: IndexedDataset, cache: IndexCache | None = None) -> Languages | None:
    """The languages in PREFIX.docs.parquet, None if there are none. Raises DataError if its rows are not the dataset's
    documents, or if it is damaged."""
    path = Path(f"{data.prefix}.docs.parquet")
    if not path.is_file():
        return None

    def build() -> dict[str, NDArray[Any]]:
        codes, names = _read(path, len(data.document_indices) - 1)
        # One sequence a document, as `preprocess` writes it; a document of several has them next to each other.
        per_sequence = np.repeat(codes, np.diff(data.document_indices))
        return {"codes": per_sequence, "names": np.frombuffer(json.dumps(names).encode(), np.uint8)}

    if cache is None:
        found = build()
    else:
        status = path.stat()
        what = {"kind": "languages", "lengths": data.lengths_hash, "rows": [status.st_size, status.st_mtime_ns]}
        found = cache.get(cache_folder(data.prefix), what, ("codes", "names"), build)
    names = json.loads(found["names"].tobytes())
    return Languages(found["codes"], names) if names else None


def _read(path: Path, documents: int) -> tuple[NDArray[np.int16], list[str]]:
    """(documents,) codes, and their names in the order in which they first come."""
    known: dict[str, int] = {"": NONE}
    codes: list[NDArray[np.int32]] = []
    try:
        with pq.ParquetFile(path) as file:
            if "language" not in file.schema_arrow.names:
                return np.full(documents, NONE, np.int16), []
            for batch in file.iter_batches(1 << 16, columns=["language"]):
                column = batch.column(0).cast(pa.string()).fill_null("").dictionary_encode()
                for name in column.dictionary.to_pylist():
                    known.setdefault(name, len(known) - 1)
                numbers = np.array([known[name] for name in column.dictionary.to_pylist()], np.int64)
                codes.append(numbers[column.indices.to_numpy()].astype(np.int32))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is damaged or truncated: {error}; write it anew, or remove it") from error
    found = np.concatenate(codes) if codes else np.zeros(0, np.int32)
    if len(known) > np.iinfo(np.int16).max:
        raise DataError(f"{path}: {len(known)} different languages; allowed: {np.iinfo(np.int16).max}")
    if len(found) != documents:
        raise DataError(
            f"{path} describes {len(found)} documents, the dataset beside it has {documents}: copy the one that was made with it, or "
            "remove it"
        )
    return found.astype(np.int16), [name for name in known if name]


def number_groups(prefixes: Sequence[str], languages: Sequence[Languages | None]) -> tuple[GroupNames, list[Groups]]:
    """The groups of a blend of the datasets `prefixes`, and the numbers of each of them. The same files give the same numbers
    on every rank."""
    sources = list(dict.fromkeys(prefixes))
    names = sorted({name for each in languages if each is not None for name in each.names})
    place = {name: len(sources) + i for i, name in enumerate(names)}
    groups = [
        Groups(
            sources.index(prefix),
            each.codes if each is not None else None,
            np.array([*(place[name] for name in each.names), NONE] if each is not None else [NONE], np.int16),
        )
        for prefix, each in zip(prefixes, languages, strict=True)
    ]
    return GroupNames(sources, names), groups
