"""Downsampling of over-represented languages to a budget, the last step of RefineCode (arXiv:2411.04905).

A record's place is drawn from a hash of its id and the seed. Of each language with a budget, records are kept up to the
place where the budget is full, so what is kept depends on the ids and sizes alone: not on order, shards or workers; and a
smaller budget keeps a part of what a larger one keeps.

Three steps, so that no machine has to hold all records: `totals` per shard, added up by `merge`, `cuts` once, and
`decide` per shard again. `sample` does all for one table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opencoder.corpus_config import CorpusConfig, SampleConfig
from opencoder.errors import ConfigError, nearest

from .language import tables

BINS = 1 << 16
"""Places are counted in this many bins. A cut lies between two bins, so at most the content of one bin, 1/65536 of a
language or one document, is left of a budget."""
STAGE = "sample"


class Totals(NamedTuple):
    """What the records of one language amount to, by their drawn places."""

    amounts: NDArray[np.float64]
    """(BINS,) bytes, or counted tokens, in each bin; whole numbers below 2^53, so no order of adding differs."""
    records: int
    counted: bool
    """Whether the amounts are counted tokens."""


class Cut(NamedTuple):
    """Where a language is cut."""

    place: float
    """Records with a place below are kept; in [0, 1], a multiple of 1/BINS."""
    amount: float
    """Bytes or tokens of the language before."""
    kept: float
    """And after."""
    budget: str
    """The budget in words."""


class Decision(NamedTuple):
    """Why one record is dropped."""

    row: int
    stage: str
    reason: str
    value: float
    """The record's place."""
    threshold: str


def check(config: CorpusConfig) -> None:
    """Raise ConfigError for a budget of a language that the table does not have."""
    known = tables().doc_types
    for language in config.sample.budgets:
        if language not in known:
            raise ConfigError(
                f"sample.budgets.{language}: no such language{nearest(language, known)}; names are those of "
                "opencoder/corpus/languages.json"
            )


def places(ids: pa.ChunkedArray | pa.Array | list[str], seed: int) -> NDArray[np.float64]:
    """(records,) place in [0, 1) of each id (SHA-256 in hex): its first 64 bits, mixed with the seed.

    Raises ValueError for an id that does not begin with 16 hexadecimal digits."""
    strings = pa.array(ids, pa.string()) if isinstance(ids, list) else ids
    heads = b"".join(str(i)[:16].encode() for i in strings.to_pylist())
    try:
        if len(heads) != 16 * len(strings):
            raise ValueError
        words = np.frombuffer(bytes.fromhex(heads.decode()), ">u8").astype(np.uint64)
    except ValueError:
        raise ValueError("every id must be a SHA-256 in hexadecimal digits") from None
    # splitmix64's finaliser (Steele, Lea, Flood 2014): every bit of id and seed reaches every bit of the place.
    mixed = words + np.uint64((seed * 0x9E3779B97F4A7C15) % 2**64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _rows(table: pa.Table, config: SampleConfig) -> dict[str, NDArray[np.int64]]:
    """language → its rows, for languages with a budget."""
    if not config.enabled or not config.budgets:
        return {}
    column = table["language"].combine_chunks().dictionary_encode()
    codes = column.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    names = column.dictionary.to_pylist()
    return {n: np.flatnonzero(codes == code) for code, n in enumerate(names) if n in config.budgets}


def totals(table: pa.Table, config: SampleConfig) -> dict[str, Totals]:
    """Amounts by place of the records of a shard that are still alive. Columns: id, language, size_bytes and, if the
    tokens have been counted, tokens."""
    found = {}
    for language, rows in _rows(table, config).items():
        part = table.take(pa.array(rows))
        bins = (places(part["id"], config.seed) * BINS).astype(np.int64)
        counted = config.budgets[language].max_tokens is not None and "tokens" in table.column_names
        amounts = np.asarray(part["tokens" if counted else "size_bytes"].to_numpy(), np.float64)
        found[language] = Totals(np.bincount(bins, amounts, BINS).astype(np.float64), len(rows), counted)
    return found


def merge(parts: Iterable[dict[str, Totals]]) -> dict[str, Totals]:
    """The totals of all shards together. Raises ValueError if tokens are counted in some shards only."""
    result: dict[str, Totals] = {}
    for part in parts:
        for language, new in part.items():
            old = result.get(language)
            if old is not None:
                if old.counted != new.counted:
                    raise ValueError(
                        f"the tokens of {language} are counted in some shards only: count them in all or none"
                    )
                new = Totals(old.amounts + new.amounts, old.records + new.records, new.counted)
            result[language] = new
    return result


def cuts(merged: dict[str, Totals], config: SampleConfig) -> dict[str, Cut]:
    """The cut of each language that exceeds its budget; languages within it are not in the result."""
    result = {}
    for language, (amounts, _, counted) in sorted(merged.items()):
        budget = config.budgets[language]
        upto = np.concatenate([[0.0], np.cumsum(amounts)])
        if budget.max_tokens is not None:
            limit = budget.max_tokens * (1.0 if counted else config.bytes_per_token)
            words = f"{budget.max_tokens:,} tokens" + ("" if counted else f" of {config.bytes_per_token:g} bytes")
        elif budget.max_bytes is not None:
            limit, words = float(budget.max_bytes), f"{budget.max_bytes:,} bytes"
        else:
            assert budget.ratio is not None
            limit, words = float(upto[-1] * budget.ratio), f"a share of {budget.ratio:g}"
        if upto[-1] <= limit:
            continue
        # The last bin edge within the limit; of edges with nothing between them, the first.
        edge = int(np.searchsorted(upto, upto[np.searchsorted(upto, limit, "right") - 1], "left"))
        result[language] = Cut(edge / BINS, float(upto[-1]), float(upto[edge]), words)
    return result


def decide(table: pa.Table, found: dict[str, Cut], config: SampleConfig) -> list[Decision]:
    """The records of a shard that are dropped, by row; columns as for `totals`."""
    decisions = []
    for language, rows in _rows(table, config).items():
        if (cut := found.get(language)) is None:
            continue
        drawn = places(table["id"].take(pa.array(rows)), config.seed)
        threshold = f">= {cut.place:.6f} ({language} is cut to {cut.budget})"
        for row, place in zip(rows, drawn, strict=True):
            if place >= cut.place:
                decisions.append(Decision(int(row), STAGE, "over_budget", float(place), threshold))
    return sorted(decisions)


def sample(table: pa.Table, config: SampleConfig) -> list[Decision]:
    """All steps for one table: the records that are dropped; all others are kept."""
    return decide(table, cuts(totals(table, config), config), config)
