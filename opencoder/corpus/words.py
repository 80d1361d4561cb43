"""Words and lines of a document as the published filter counts them."""

from __future__ import annotations

import re
import string
import unicodedata
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

_DELETED = dict.fromkeys([*range(0x08), *range(0x0E, 0x1B), *range(0x1C, 0x20), 0x202C])
# ASCII punctuation becomes a space. So do its full-width forms, and the CJK marks and typographic quotes that the
# published normalisation first maps to ASCII punctuation.
_SPACED = [*string.punctuation, *(chr(ord(c) + 0xFEE0) for c in string.punctuation), "\u2009", "\u200b"]
_SPACED += list("。、「」『』《》【】‘’“”")
_TRANSLATION = {**_DELETED, **dict.fromkeys(map(ord, _SPACED), " ")}
_PIECES = re.compile(r"\w+|[^\w\s]+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def normalised_words(line: str) -> list[str]:
    """Words of one line: punctuation to spaces, lower case, NFKC, then runs of word characters or of other symbols."""
    line = " ".join(line.translate(_TRANSLATION).lower().split())
    if not line.isascii():
        line = unicodedata.normalize("NFKC", line)
    return _PIECES.findall(line)


def raw_lines(text: str) -> list[str]:
    """The text cut after each newline, which stays part of its line."""
    lines = text.split("\n")
    last = lines.pop()
    return [line + "\n" for line in lines] + ([last] if last else [])


class Words:
    """The normalised words of a text, and what is counted over them."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def words(self) -> list[str]:
        """All normalised words, in order."""
        return [word for line in self.text.split("\n") for word in normalised_words(line)]

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Characters of each word."""
        return np.fromiter(map(len, self.words), np.int64, len(self.words))

    @cached_property
    def _codes(self) -> NDArray[np.uint64]:
        """A number for each distinct word, spread over 64 bits."""
        numbers: dict[str, int] = {}
        codes = np.fromiter((numbers.setdefault(w, len(numbers)) for w in self.words), np.uint64, len(self.words))
        with np.errstate(over="ignore"):
            mixed = (codes + np.uint64(1)) * _MULTIPLIER
            mixed ^= mixed >> np.uint64(29)
            return mixed * np.uint64(0xBF58476D1CE4E5B9)

    def _ngrams(self, n: int) -> NDArray[np.uint64]:
        """A 64-bit hash of the n words from each position on; empty if there are fewer words."""
        count = len(self.words) - n + 1
        if count <= 0:
            return np.zeros(0, np.uint64)
        codes, result = self._codes, np.zeros(count, np.uint64)
        with np.errstate(over="ignore"):
            for j in range(n):
                result = result * _MULTIPLIER + codes[j : j + count]
        return result

    @cached_property
    def distinct(self) -> NDArray[np.int64]:
        """How often each distinct word occurs."""
        return np.unique(self._codes, return_counts=True)[1]

    def top_ngram_share(self, n: int) -> float:
        """Characters of the most frequent n-gram (the first of equals) times its count, over those of all words."""
        total, hashes = int(self.lengths.sum()), self._ngrams(n)
        if total == 0 or len(hashes) == 0:
            return 0.0
        _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
        most = int(counts.max())
        if most == 1:
            return 0.0
        at = int(first[counts == most].min())
        return int(self.lengths[at : at + n].sum()) * most / total

    def repeated_ngram_share(self, n: int) -> float:
        """Share of the words' characters that lie in an n-gram that occurs at least twice."""
        total, hashes = int(self.lengths.sum()), self._ngrams(n)
        if total == 0 or len(hashes) == 0:
            return 0.0
        _, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
        repeated = np.zeros(len(self.words) + 1, np.int64)
        starts = np.flatnonzero(counts[inverse] > 1)
        np.add.at(repeated, starts, 1)
        np.add.at(repeated, starts + n, -1)
        covered = np.cumsum(repeated[:-1]) > 0
        return int(self.lengths[covered].sum()) / total
