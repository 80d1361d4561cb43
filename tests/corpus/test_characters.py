"""The C++ engine's table of characters against Python's own, over all of Unicode (several seconds, so not among the fast)."""

from __future__ import annotations

import sys

import pytest

from opencoder.corpus.signals import characters, prose, strings, words

from .test_text_counts import by_definition, needs_engine, same


@needs_engine
def test_engine_knows_every_character_as_python_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every code point between letters, between signs and alone in its line."""
    for start in range(0, sys.maxunicode + 1, 0x8000):
        block = list(map(chr, range(start, start + 0x8000)))
        text = "\n".join(f"a{c}b {c} 0x1{c}" for c in block if c != "\n")
        if start >= characters.TABLE_SIZE and start != 0xE0000:  # nothing there: a few are enough
            text = "\n".join(f"a{c}b {c} 0x1{c}" for c in block[::97])
        for count in (characters.count_characters, words.count_words, strings.hex_word_characters, prose.count_prose):
            assert same(count(text), by_definition(count, text, monkeypatch)), (hex(start), count.__name__)
