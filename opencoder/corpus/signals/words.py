"""The words of a document as the published filter counts them, and how much of the text repeats itself.

Normalised words: control characters deleted, punctuation (ASCII, its full-width forms, and the CJK marks and typographic
quotes that the published normalisation maps to ASCII) turned into spaces, lower case, NFKC; then runs of word characters
or runs of other symbols. The published filter does this line by line; no step looks across a line end, so that the
whole text gives the same. This module is the definition; csrc/text/words.cpp computes the same numbers."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from itertools import pairwise
from typing import NamedTuple

import regex

from .characters import TRANSLATION, engine

PIECES = regex.compile(r"\w+|[^\w\s\x1c-\x1f]+")
"""Words: runs of word characters, or runs of other characters that are not white space (str.isspace, which knows the four
separators that `\\s` of regex leaves out)."""
TOP = (2, 3, 4)
"""Lengths n of the n-grams whose most frequent one is looked at."""
REPEATED = (5, 6, 7, 8, 9, 10)
"""Lengths n of the n-grams whose repetitions are looked at."""


class WordCounts(NamedTuple):
    """What is counted over the normalised words."""

    words: int
    characters: int
    """Of all words."""
    distinct: int
    entropy: float
    """Of the distribution of the words, in nats; 0 without words."""
    top: tuple[int, ...]
    """For each n of TOP: characters of the most frequent n-gram (the first of equals) times its count; 0 if none repeats."""
    repeated: tuple[int, ...]
    """For each n of REPEATED: characters of the words that lie in an n-gram that occurs at least twice."""


def normalised(text: str) -> str:
    """The text whose pieces are the normalised words."""
    text = text.translate(TRANSLATION).lower()
    return text if text.isascii() else unicodedata.normalize("NFKC", text)


def normalised_words(text: str) -> list[str]:
    """The normalised words, in order."""
    found: list[str] = PIECES.findall(normalised(text))
    return found


def chinese_words(text: str) -> list[str]:
    """The normalised words of a Chinese text: jieba's segmentation (by rjieba) of the normalised lines."""
    import rjieba  # here: its dictionary costs memory, and most corpora have no Chinese prose

    return [word for line in normalised(text).split("\n") for word in rjieba.cut(line) if word.strip()]


def count_words(text: str, natural_language: str = "en") -> WordCounts:
    """WordCounts of a text."""
    cpp = engine()
    if natural_language == "zh":
        words = chinese_words(text)
        return count_word_list(words) if cpp is None else WordCounts(*cpp.count_word_lines("\n".join(words)))
    if cpp is None:
        return count_word_list(normalised_words(text))
    if text.isascii():
        return WordCounts(*cpp.count_words(text, ""))
    # lower() and NFKC are Python's; the engine hands over the lines that need them, and reads them back line by line.
    lines = cpp.lines_to_normalise(text)
    return WordCounts(*cpp.count_words(text, unicodedata.normalize("NFKC", lines.lower())))


def count_word_list(words: list[str]) -> WordCounts:
    """WordCounts of a list of words. The n-grams of length n are looked for only where those of length n−1 repeat."""
    lengths = [len(word) for word in words]
    frequency = Counter(words)
    entropy = math.fsum(-n / len(words) * math.log(n / len(words)) for n in frequency.values())
    top, repeated = [], []
    candidates = list(range(len(words)))  # first words of n-grams that may repeat
    for n in range(2, REPEATED[-1] + 1):
        ngrams = {i: tuple(words[i : i + n]) for i in candidates if i + n <= len(words)}
        counts = Counter(ngrams.values())
        if n in TOP:
            gram, count = counts.most_common(1)[0] if counts else ((), 0)
            top.append(sum(map(len, gram)) * count if count > 1 else 0)
        candidates = [i for i, gram in ngrams.items() if counts[gram] > 1]
        if n in REPEATED:
            repeated.append(_covered(candidates, n, lengths))
    return WordCounts(len(words), sum(lengths), len(frequency), entropy, tuple(top), tuple(repeated))


def _covered(starts: list[int], n: int, lengths: list[int]) -> int:
    """Characters of the words that lie in one of the n-grams that begin at `starts` (ascending)."""
    bounds = [*starts, len(lengths)]
    return sum(sum(lengths[here : min(here + n, after)]) for here, after in pairwise(bounds))
