"""What the modules of this package share: the text engine, counts over the code of a document, and shares of its lines."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Protocol, TypeVar

from opencoder.native import text_engine

from ..document import Document, Signal, Value, share


class LineCounts(Protocol):
    """Counts over the code of a file."""

    @property
    def lines(self) -> int:
        """Code lines that are not blank."""


C = TypeVar("C")
L = TypeVar("L", bound=LineCounts)


def engine() -> ModuleType:
    """The text engine. Raises RuntimeError where it was not built."""
    found = text_engine()
    if found is None:
        raise RuntimeError(
            "signals of single languages need the text engine: install a C++ compiler, then `pip install -e .`"
        )
    return found


def counted_once(count: Callable[[str, bool], C]) -> Callable[[Document], C]:
    """Document → `count(code, strict)`, worked out once for the signals that ask for it; strict means the default mode."""
    kept = lru_cache(maxsize=1)(count)
    return lambda d: kept(d.split.code, not d.compat)


def share_of_lines(counts: Callable[[Document], L], number: Callable[[L], int]) -> Signal:
    """A signal: `number` of a document's counts over its code lines."""

    def signal(d: Document) -> Value:
        n = counts(d)
        return share(number(n), n.lines)

    return signal
