"""What language-model training reads: one dataset, or a blend of several by weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opencoder.errors import DataError

from .cache import IndexCache, cache_folder
from .fim import Fim
from .gpt import GPTDataset, Sample, split_bounds
from .groups import number_groups, read_languages
from .index import build_blending_indices
from .indexed import IndexedDataset

SURPLUS = 0.005
"""Each member of a blend prepares this share more samples than its weight asks for, as Megatron does."""

__all__ = ["BlendedDataset", "Sample", "build_lm_dataset"]


class BlendedDataset:
    """`size` samples drawn from `members` in proportion to their weights; order within a member is the member's."""

    def __init__(
        self, members: Sequence[GPTDataset], weights: Sequence[float], size: int, cache: IndexCache | None = None
    ) -> None:
        self.members = members
        self.seq_len, self.group_names = members[0].seq_len, members[0].group_names
        shares = [w / math.fsum(weights) for w in weights]

        def build() -> dict[str, NDArray[Any]]:
            return dict(zip(("member", "index"), build_blending_indices(np.asarray(shares), size), strict=True))

        if cache is None:
            indices = build()
        else:
            what = {"kind": "blend", "shares": shares, "size": size}
            indices = cache.get(cache_folder(members[0].data.prefix), what, ("member", "index"), build)
        self.member, self.index = indices["member"], indices["index"]

    def __len__(self) -> int:
        return len(self.member)

    def __getitem__(self, i: int) -> Sample:
        return self.members[self.member.item(i)][self.index.item(i)]

    def bounds(self, i: int) -> NDArray[np.int32]:
        """`cu_seqlens` of sample i, without its tokens being read."""
        return self.members[self.member.item(i)].bounds(self.index.item(i))


def build_lm_dataset(
    blend: Sequence[tuple[str, float]],
    *,
    num_samples: int,
    seq_len: int,
    seed: int,
    split: str = "1,0,0",
    part: int = 0,
    cache: IndexCache | None = None,
    fim: Fim | None = None,
    groups: bool = False,
) -> GPTDataset | BlendedDataset:
    """`num_samples` samples from the (prefix, weight) pairs; `part` 0, 1, 2 = training, validation, test of `split`.

    Indices come from `cache`, or are built in memory without one. `groups`: samples say which dataset and language they are
    from. Raises DataError for a missing or damaged dataset, or an empty part."""
    total = math.fsum(weight for _, weight in blend)
    members: dict[int, GPTDataset] = {}
    for m in cache.order(len(blend)) if cache else range(len(blend)):
        prefix, weight = blend[m]
        data = IndexedDataset(prefix)
        begin, end = _part(data, split, part)
        wanted = num_samples
        if len(blend) > 1:
            wanted = math.ceil(math.ceil(num_samples * weight / total) * (1 + SURPLUS))
        members[m] = GPTDataset(
            data, seq_len=seq_len, num_samples=wanted, seed=seed, begin=begin, end=end, cache=cache, fim=fim
        )
    if groups:
        languages = {m: read_languages(member.data, cache) for m, member in members.items()}
        names, found = number_groups([prefix for prefix, _ in blend], [languages[m] for m in range(len(blend))])
        for m, member in members.items():
            member.groups, member.group_names = found[m], names
    if len(blend) == 1:
        return members[0]
    return BlendedDataset([members[m] for m in range(len(blend))], [w for _, w in blend], num_samples, cache)


def _part(data: IndexedDataset, split: str, part: int) -> tuple[int, int]:
    """Documents [begin, end) of one part of the split. Raises DataError if there are none."""
    bounds = split_bounds(split, len(data))
    begin, end = bounds[part] if part < len(bounds) else (0, 0)
    if begin == end:
        name = ("training", "validation", "test")[part]
        raise DataError(
            f"{data.prefix}: data.split={split} leaves no {name} documents of {len(data)}: give that part a larger share"
        )
    return begin, end
