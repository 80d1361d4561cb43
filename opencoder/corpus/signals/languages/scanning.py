"""What the modules of this package share: the text engine and shares of lines."""

from __future__ import annotations

from types import ModuleType

from opencoder.native import text_engine


def engine() -> ModuleType:
    """The text engine. Raises RuntimeError where it was not built."""
    found = text_engine()
    if found is None:
        raise RuntimeError(
            "signals of single languages need the text engine: install a C++ compiler, then `pip install -e .`"
        )
    return found


def share(count: float, lines: int) -> float | None:
    """`count` over the number of code lines; None if there are none."""
    return count / lines if lines else None
