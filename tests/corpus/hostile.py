"""What the tests of texts made to be slow share (opencoder.tools.bench_hostile has the texts and measures times)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from opencoder.tools.bench_hostile import Hostile


def each(texts: Sequence[Hostile]) -> Any:
    """A test for each text, given to it as `hostile`."""
    return pytest.mark.parametrize("hostile", texts, ids=lambda text: text.name[:12])


def grows_evenly(counts: Callable[[str], Sequence[Any]], hostile: Hostile) -> bool:
    """Whether each repetition of the piece adds the same to every count, from 120 up to 6,000 of them; a count that is a bool
    or None stays as it is."""
    few, more, many = 120, 180, 6000
    found = [counts(hostile.of(repeats * len(hostile.piece + hostile.after))) for repeats in (few, more, many)]
    for a, b, c in zip(*found, strict=True):
        if a is None or isinstance(a, bool):
            if not a == b == c:
                return False
        elif (b - a) * (many - few) != (c - a) * (more - few):
            return False
    return True
