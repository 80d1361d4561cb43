"""What the searches for personal data give back."""

from __future__ import annotations

from typing import Literal, NamedTuple

Kind = Literal["email", "ip_address", "key", "password", "name"]
KINDS: tuple[Kind, ...] = ("key", "password", "email", "ip_address", "name")
"""In order of precedence where two overlap."""


class PiiSpan(NamedTuple):
    """One piece of personal data."""

    start: int
    """Offset in characters in the original text."""
    end: int
    kind: Kind


def line_of(text: str, start: int, end: int, reach: int = 120) -> tuple[str, str]:
    """What stands before `start` and behind `end` on the same line, at most `reach` characters each."""
    left = text[max(0, start - reach) : start]
    right = text[end : end + reach]
    return left[left.rfind("\n") + 1 :], right.split("\n", 1)[0]
