"""Fill-in-the-middle (arXiv:2207.14255): a document cut into prefix, middle and suffix, and put in another order.

PSM: <prefix> p <suffix> s <middle> m.  SPM, with the text still in front of the middle: <prefix> <suffix> s <middle> p m."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

SENTINELS = 3
"""Tokens that are added, so as many of the text's own have to go."""


class FimIds(NamedTuple):
    """Ids of the three sentinels."""

    prefix: int
    middle: int
    suffix: int


def arrange(
    ids: FimIds, prefix: NDArray[Any], middle: NDArray[Any], suffix: NDArray[Any], *, spm: bool
) -> NDArray[Any]:
    """The three parts in the order of PSM or SPM, with the sentinels. Result in the parts' dtype."""
    p, m, s = (np.array([i], prefix.dtype) for i in ids)
    return np.concatenate([p, s, suffix, m, prefix, middle] if spm else [p, prefix, s, suffix, m, middle])


@dataclass(frozen=True)
class Fim:
    """Fill-in-the-middle while reading: each piece of a document inside a sample is treated by itself.

    A piece keeps its length: the last three tokens of its text give way to the sentinels, before it is cut, so that no
    target of the middle is lost. An end-of-document token stays at the end. The draw depends on the seed and the piece's
    place in the data alone: not on workers, ranks or the step a run was resumed at. Neighbouring samples share one token
    of text; each sees it in its own arrangement."""

    rate: float
    """Share of the pieces that are rearranged, 0 to 1."""
    spm_rate: float
    """Share of those in the order SPM; the others are PSM."""
    min_tokens: int
    """Shorter pieces are left as they are; at least 4."""
    ids: FimIds
    eod: int | None
    """Id of the end-of-document token, if documents have one."""
    seed: int

    def apply(self, piece: NDArray[np.int64], *, slot: int, offset: int, ends_document: bool) -> NDArray[np.int64]:
        """(tokens,) → (tokens,). The piece is that of entry `slot` of the document index, from token `offset` on.

        A piece that holds a sentinel already, from `preprocess --fim-rate`, is left as it is."""
        whole = SENTINELS + 1
        if len(piece) < max(self.min_tokens, whole):
            return piece
        chosen, order, first, second = self._draw(slot, offset)
        if chosen >= self.rate:
            return piece
        has_eod = ends_document and piece[-1] == self.eod
        body, tail = (piece[:-1], piece[-1:]) if has_eod else (piece, piece[:0])
        if len(body) < whole or any((body == i).any() for i in self.ids):
            return piece
        text = body[:-SENTINELS]
        a = int(first * (len(text) + 1))
        b = int(second * len(text))
        a, b = (b, a) if b < a else (a, b + 1)  # two different borders out of len + 1, all pairs equally likely
        return np.concatenate(
            [arrange(self.ids, text[:a], text[a:b], text[b:], spm=order < self.spm_rate), tail], dtype=np.int64
        )

    def _draw(self, slot: int, offset: int) -> tuple[float, float, float, float]:
        """Four numbers in [0, 1). A hash, because a generator per piece takes ten times as long to set up."""
        digest = hashlib.blake2b(struct.pack("<qqq", self.seed, slot, offset), digest_size=32).digest()
        a, b, c, d = ((x >> 11) * 2.0**-53 for x in struct.unpack("<4Q", digest))
        return a, b, c, d
