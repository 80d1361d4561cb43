"""Small conversations as token ids, without a tokenizer."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from opencoder.data.sft_files import SftWriter

VOCAB = 250
Pair = tuple[list[int], list[bool]]


def conversations(n: int, *, longest: int = 40, seed: int = 0) -> list[Pair]:
    """ids and mask of n conversations of 3 to `longest` tokens; each has at least one target, its last token but one."""
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        length = int(np.clip(draw.lognormal(np.log(longest / 4), 0.7), 3, longest))
        mask = draw.random(length) < 0.5
        mask[0], mask[-2], mask[-1] = False, True, False
        found.append((draw.integers(0, VOCAB, length).tolist(), mask.tolist()))
    return found


def write(prefix: Path, pairs: list[Pair]) -> Path:
    with SftWriter(prefix, np.uint16) as writer:
        for ids, mask in pairs:
            writer.add(ids, mask)
    return prefix


def labels_of(pair: Pair) -> tuple[list[int], list[int]]:
    """Inputs and labels of one conversation on its own."""
    ids, mask = pair
    return ids[:-1], [i if m else -100 for i, m in zip(ids[1:], mask[1:], strict=True)]


def conversations_in(sample: Any) -> list[tuple[list[int], list[int]]]:
    """Inputs and labels of each document of a sample that has a target."""
    bounds = sample.cu_seqlens.tolist()
    found = []
    for begin, end in pairwise(bounds):
        labels = sample.labels[begin:end].tolist()
        if any(label >= 0 for label in labels):
            found.append((sample.tokens[begin:end].tolist(), labels))
    return found
