"""Which n-grams of reference texts occur in a document: the index of csrc/text/ngram_index.cpp, and the same in Python for
machines without it."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from opencoder.native import text_engine


class Gram(NamedTuple):
    """An n-gram of a reference."""

    ref: int
    offset: int
    """Tokens before it in the reference."""
    key: int
    """What it counts for; n-grams of one key that overlap or touch in a document make one run."""


class NgramIndex(Protocol):
    """What both versions do."""

    def check(self, lowered: bytes, most: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        """(runs, names, left out) of a lower-cased document in UTF-8. runs (r, 6): key, first character, end, distinct
        positions that match, reference and token offset of the first. names (m, 3): name, first character, end. At most
        `most` runs; the rest is counted in left out."""


@cache
def word_table() -> bytes:
    """A byte per code point: whether `\\w` of Python's `re` takes it."""
    return bytes(chr(i).isalnum() or i == ord("_") for i in range(sys.maxunicode + 1))


def make_index(
    refs: Sequence[Sequence[str]], grams: Sequence[Gram], *, ngram: int, keys: int, names: Sequence[str]
) -> NgramIndex:
    """An index over `grams` of the references (lists of tokens); keys are below `keys`. `names` are single tokens."""
    engine = text_engine()
    if engine is None:
        return PythonIndex(refs, grams, ngram=ngram, names=names)
    rows = np.array(grams, np.int64).reshape(len(grams), 3)
    joined = [" ".join(ref).encode("utf-8", "surrogatepass") for ref in refs]
    encoded = [name.encode("utf-8", "surrogatepass") for name in names]
    made: NgramIndex = engine.NgramIndex(word_table(), ngram, joined, rows, keys, encoded)
    return made


class PythonIndex:
    """The same answers, slowly."""

    def __init__(
        self, refs: Sequence[Sequence[str]], grams: Sequence[Gram], *, ngram: int, names: Sequence[str]
    ) -> None:
        self.ngram = ngram
        self.names = {name: number for number, name in enumerate(names)}
        self.table: dict[tuple[str, ...], list[Gram]] = {}
        for gram in sorted(grams, key=lambda g: (g.key, g.ref, g.offset)):
            words = tuple(refs[gram.ref][gram.offset : gram.offset + ngram])
            same = self.table.setdefault(words, [])
            if not same or same[-1].key != gram.key:  # twice in one task counts once
                same.append(gram)

    def check(self, lowered: bytes, most: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        """As in NgramIndex."""
        found = list(re.finditer(r"\w+", lowered.decode("utf-8", "surrogatepass")))
        words = [match.group() for match in found]
        names = [(self.names[w], *m.span()) for w, m in zip(words, found, strict=True) if w in self.names]
        runs: list[list[int]] = []
        open_runs: dict[int, list[int]] = {}  # key -> the row, then the last token position
        closed: list[list[int]] = []
        for start in range(len(words) - self.ngram + 1):
            for gram in self.table.get(tuple(words[start : start + self.ngram]), ()):
                run = open_runs.get(gram.key)
                if run is not None and start > run[6] + self.ngram:
                    closed.append(run)
                    run = None
                if run is None:
                    run = [gram.key, found[start].start(), 0, 0, gram.ref, gram.offset, start]
                    open_runs[gram.key] = run
                run[2], run[6] = found[start + self.ngram - 1].end(), start
                run[3] += 1
        closed += [open_runs[key] for key in sorted(open_runs)]
        runs = [run[:6] for run in closed[:most]]
        return _rows(runs, 6), _rows(names, 3), len(closed) - len(runs)


def _rows(rows: Sequence[Any], columns: int) -> NDArray[np.int64]:
    return np.array(rows, np.int64).reshape(len(rows), columns)
