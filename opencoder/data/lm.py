"""What language-model training reads: one dataset, or a blend of several by weight."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from opencoder.errors import DataError

from .gpt import GPTDataset, Sample, split_bounds
from .index import build_blending_indices
from .indexed import IndexedDataset

SURPLUS = 0.005
"""Each member of a blend prepares this share more samples than its weight asks for, as Megatron does."""

__all__ = ["BlendedDataset", "Sample", "build_lm_dataset"]


class BlendedDataset:
    """`size` samples drawn from `members` in proportion to their weights; order within a member is the member's."""

    def __init__(self, members: Sequence[GPTDataset], weights: Sequence[float], size: int) -> None:
        self.members = members
        total = math.fsum(weights)
        self.member, self.sample = build_blending_indices(np.asarray([w / total for w in weights]), size)

    def __len__(self) -> int:
        return len(self.member)

    def __getitem__(self, i: int) -> Sample:
        return self.members[int(self.member[i])][int(self.sample[i])]


def build_lm_dataset(
    blend: Sequence[tuple[str, float]],
    *,
    num_samples: int,
    seq_len: int,
    seed: int,
    split: str = "1,0,0",
    part: int = 0,
) -> GPTDataset | BlendedDataset:
    """`num_samples` samples from the (prefix, weight) pairs; `part` 0, 1, 2 = training, validation, test of `split`.

    Raises DataError for a missing or damaged dataset, or an empty part."""
    members = []
    total = math.fsum(weight for _, weight in blend)
    for prefix, weight in blend:
        data = IndexedDataset(prefix)
        bounds = split_bounds(split, len(data))
        begin, end = bounds[part] if part < len(bounds) else (0, 0)
        if begin == end:
            name = ("training", "validation", "test")[part]
            raise DataError(
                f"{prefix}: data.split={split} leaves no {name} documents of {len(data)}: give that part a larger share"
            )
        wanted = num_samples
        if len(blend) > 1:
            wanted = math.ceil(math.ceil(num_samples * weight / total) * (1 + SURPLUS))
        members.append(GPTDataset(data, seq_len=seq_len, num_samples=wanted, seed=seed, begin=begin, end=end))
    return members[0] if len(members) == 1 else BlendedDataset(members, [w for _, w in blend], num_samples)
