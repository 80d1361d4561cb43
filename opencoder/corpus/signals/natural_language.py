"""The natural language of prose: Chinese or, for every other, English (the tables of rules know only these two)."""

from __future__ import annotations

CHINESE_SHARE = 0.3
"""Least share of Chinese ideographs among the letters of a Chinese text."""
_SAMPLE = 20_000
"""Characters at the start of the text that are looked at."""


def detect_natural_language(text: str) -> str:
    """`zh` if at least CHINESE_SHARE of the letters are Chinese ideographs and Japanese kana are less than a twentieth of them; else
    `en`.

    The published filter asks a fastText model that was not released; this rule tells apart what its tables do."""
    if text.isascii():
        return "en"
    sample = text[:_SAMPLE]
    letters = [c for c in sample if c.isalpha()]
    ideographs = sum("\u4e00" <= c <= "\u9fff" or "\u3400" <= c <= "\u4dbf" for c in letters)
    kana = sum("\u3041" <= c <= "\u30ff" for c in letters)
    # A stray kana sign in Chinese text is common (の in names); Japanese prose has kana in every clause.
    return "zh" if ideographs >= CHINESE_SHARE * len(letters) > 0 and kana * 20 < ideographs else "en"
