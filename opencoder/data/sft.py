"""What tuning reads: rows of whole conversations, each a document of its own, with the answers as targets.

The position in the data is a number of rows, as it is a number of samples for language modelling: the order depends on the seed and
on what was asked for, never on ranks or workers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opencoder.errors import DataError

from .cache import IndexCache, cache_folder
from .gpt import Sample, split_bounds
from .groups import NONE, GroupNames, Groups, number_groups, read_languages
from .index import build_blending_indices, build_exhaustive_blending_indices
from .lm import SURPLUS
from .sft_files import SftData
from .sft_packing import Rows, pack_rows

MASKED = -100


@dataclass(frozen=True)
class Packing:
    """How rows are made; a part of what a stage of the data is known by."""

    pack: bool = True
    """False: one conversation in a row."""
    window: int = 16384
    """Conversations that are packed together."""
    epochs: int | None = None
    """Every conversation so often, and empty rows after them; None: without an end, datasets by their weights."""


class SftDataset:
    """Rows from conversations [begin, end) of one dataset: those of `packing.epochs`, or at least `num_rows`.

    Raises DataError for a conversation longer than a row."""

    def __init__(
        self,
        data: SftData,
        *,
        seq_len: int,
        num_rows: int,
        seed: int,
        packing: Packing,
        begin: int = 0,
        end: int | None = None,
        cache: IndexCache | None = None,
    ) -> None:
        end = len(data) if end is None else end
        self.data, self.seq_len, self.begin = data, seq_len, begin
        self.groups: Groups | None = None
        self.lengths = data.positions[begin:end]
        """(conversations,) places each takes."""
        if len(self.lengths) and self.lengths.max() > seq_len:
            longest, n = int(self.lengths.max()), int((self.lengths > seq_len).sum())
            raise DataError(
                f"{data.prefix}: {n} conversations are longer than data.seq_len={seq_len}, the longest by {longest - seq_len}: set "
                f"data.seq_len={longest}, or make the dataset again with `preprocess-sft --seq-len {seq_len}`"
            )
        wanted: dict[str, Any] = {"epochs": packing.epochs, "num_rows": 0 if packing.epochs is not None else num_rows}

        def build() -> dict[str, NDArray[Any]]:
            options = {**wanted, "seed": seed, "window": packing.window, "pack": packing.pack}
            return pack_rows(self.lengths, seq_len, **options)._asdict()

        if cache is None:
            arrays = build()
        else:
            asked = {"seq_len": seq_len, "seed": seed, "documents": [begin, end], **asdict(packing), **wanted}
            what = {"kind": "sft", "lengths": data.indexed.lengths_hash, **asked}
            arrays = cache.get(cache_folder(data.prefix), what, Rows._fields, build)
        self.rows = Rows(**arrays)

    def __len__(self) -> int:
        return len(self.rows.bounds) - 1

    def conversations(self, i: int) -> NDArray[np.int32]:
        """Numbers of those in row i, in the dataset."""
        return self.rows.items[self.rows.bounds[i] : self.rows.bounds[i + 1]] + np.int32(self.begin)

    def bounds(self, i: int) -> NDArray[np.int32]:
        """`cu_seqlens` of row i; what is left over at its end is a document too."""
        chosen = self.conversations(i) - self.begin
        ends = np.cumsum(self.lengths[chosen], dtype=np.int32)
        return np.concatenate([[0], ends, [self.seq_len] if ends[-1] < self.seq_len else []]).astype(np.int32)

    def __getitem__(self, i: int) -> Sample:
        sample = empty_row(self.seq_len, with_groups=self.groups is not None)
        at = 0
        chosen = self.conversations(i)
        for number in chosen.tolist():
            ids, mask = self.data.conversation(number)
            end = at + len(ids) - 1
            sample.tokens[at:end] = ids[:-1]
            sample.labels[at:end] = np.where(mask[1:] != 0, ids[1:].astype(np.int64), MASKED)
            at = end
        if self.groups is not None and sample.groups is not None:
            sample.groups[:at] = self.groups.of(chosen.tolist(), self.lengths[chosen - self.begin].tolist())
        return sample._replace(cu_seqlens=self.bounds(i))

    def read(self, rows: int) -> tuple[int, int]:
        """(conversations, places they take) in the first `rows` rows."""
        items = self.rows.items[: self.rows.bounds[min(rows, len(self))]]
        return len(items), int(self.lengths[items].sum(dtype=np.int64))


def empty_row(seq_len: int, *, with_groups: bool) -> Sample:
    """A row without a conversation: one document of token 0 and no target."""
    return Sample(
        np.zeros(seq_len, np.int64),
        np.full(seq_len, MASKED, np.int64),
        np.array([0, seq_len], np.int32),
        np.full((seq_len, 2), NONE, np.int16) if with_groups else None,
    )


class SftBlend:
    """`size` rows out of `members`. With epochs every row of every member once, in proportion, and then empty ones; otherwise by
    weight, the members going on as long as they must."""

    def __init__(self, members: Sequence[SftDataset], weights: Sequence[float], size: int, *, once: bool) -> None:
        self.members, self.seq_len, self.size = members, members[0].seq_len, size
        self.group_names: GroupNames | None = None
        if once:
            rows = np.array([len(member) for member in members], np.int64)
            self.shares = (rows / rows.sum()).tolist()
            self.member, self.index = build_exhaustive_blending_indices(rows)
        else:
            self.shares = [weight / math.fsum(weights) for weight in weights]
            self.member, self.index = build_blending_indices(np.asarray(self.shares), size)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> Sample:
        if i >= len(self.member):
            return empty_row(self.seq_len, with_groups=self.group_names is not None)
        return self.members[self.member.item(i)][self.index.item(i)]

    def bounds(self, i: int) -> NDArray[np.int32]:
        """`cu_seqlens` of row i, without its tokens being read."""
        if i >= len(self.member):
            return np.array([0, self.seq_len], np.int32)
        return self.members[self.member.item(i)].bounds(self.index.item(i))

    def rows_of(self, rows: int) -> list[int]:
        """How many of the first `rows` rows each member gives."""
        found: list[int] = np.bincount(self.member[:rows], minlength=len(self.members)).tolist()
        return found


def build_sft_dataset(
    blend: Sequence[tuple[str, float]],
    *,
    num_rows: int,
    seq_len: int,
    seed: int,
    packing: Packing,
    split: str = "1,0,0",
    part: int = 0,
    cache: IndexCache | None = None,
    groups: bool = False,
) -> SftBlend:
    """`num_rows` rows from the (prefix, weight) pairs; arguments as for `build_lm_dataset`. Raises DataError."""
    members: list[SftDataset] = []
    total = math.fsum(weight for _, weight in blend)
    for prefix, weight in blend:
        data = SftData(prefix)
        bounds = split_bounds(split, len(data))
        begin, end = bounds[part] if part < len(bounds) else (0, 0)
        if begin == end:
            name = ("training", "validation", "test")[part]
            raise DataError(
                f"{prefix}: data.split={split} leaves no {name} conversations of {len(data)}: give that part a larger share"
            )
        wanted = num_rows if len(blend) == 1 else math.ceil(num_rows * weight / total * (1 + SURPLUS)) + 1
        options: dict[str, Any] = {"seq_len": seq_len, "seed": seed, "packing": packing, "cache": cache}
        members.append(SftDataset(data, num_rows=wanted, begin=begin, end=end, **options))
    found = SftBlend(members, [weight for _, weight in blend], num_rows, once=packing.epochs is not None)
    if groups:
        languages = [read_languages(member.data.indexed, cache) for member in members]
        found.group_names, numbered = number_groups([prefix for prefix, _ in blend], languages)
        for member, group in zip(members, numbered, strict=True):
            member.groups = group
    return found
