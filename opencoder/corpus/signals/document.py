"""One document as the signals see it: its text and metadata, and what several signals share, worked out once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from ..lexing import Split, raw_lines, split
from .characters import CharacterCounts, count_characters
from .code_text import CodeLineCounts, count_code_lines
from .prose import ProseCounts, count_prose
from .strings import StringCounts, count_strings
from .words import WordCounts, count_words

Value = float | int | bool | None
"""What a signal gives; None where it has no value."""


def filled_lines(text: str) -> list[str]:
    """The raw lines that are not blank."""
    return [line for line in raw_lines(text) if not line.isspace()]


@dataclass
class Document:
    """A document; every field but the text says where it comes from or how to look at it."""

    text: str
    """Content with every line end a single newline (the published filter reads files in text mode)."""
    size_bytes: int
    """Size of the file as read."""
    file_name: str = ""
    """Last component of the path; in compat mode without its extension, as the published notebook passes it."""
    extension: str = ""
    """Without dot, case kept; empty if the name has none."""
    language: str = "unknown"
    """Name in languages.json."""
    doc_type: str = "code"
    """code, data or text."""
    natural_language: str = "en"
    """ISO 639-1 code of the language that the document is written in."""
    compat: bool = False
    """Reproduce the published filter with its defects."""

    @cached_property
    def lines(self) -> list[str]:
        """Raw lines, each with its newline."""
        return raw_lines(self.text)

    @cached_property
    def split(self) -> Split:
        """Code and comments; a text of unknown language is all code."""
        if self.language == "unknown":
            return Split(self.text, "")
        return split(self.text, self.language, compat=self.compat)

    @cached_property
    def code_lines(self) -> list[str]:
        """Lines of the code that are not blank, each with its newline."""
        return filled_lines(self.split.code)

    @cached_property
    def comment_lines(self) -> list[str]:
        """Lines of the comments that are not blank, each with its newline."""
        return filled_lines(self.split.comments)

    @cached_property
    def characters(self) -> CharacterCounts:
        """Counts over the characters and lines of the text."""
        return count_characters(self.text)

    @property
    def visible(self) -> int:
        """Characters that are not white space."""
        return len(self.text) - self.characters.white_space

    @cached_property
    def words(self) -> WordCounts:
        """Counts over the normalised words."""
        return count_words(self.text, self.natural_language)

    @cached_property
    def prose(self) -> ProseCounts:
        """Counts over sentences, lines and raw words."""
        return count_prose(self.text)

    @cached_property
    def code_counts(self) -> CodeLineCounts:
        """Counts over the code lines."""
        return count_code_lines(self.split.code)

    @cached_property
    def strings(self) -> StringCounts:
        """Counts over the string literals of the code."""
        return count_strings(self.split.code)


Signal = Callable[[Document], Value]


def share(part: float, whole: float) -> float | None:
    """part / whole; None if whole is 0."""
    return part / whole if whole else None
