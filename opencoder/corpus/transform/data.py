"""The word lists and token forms of pii.yaml."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml


@cache
def _file() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "pii.yaml").read_text(encoding="utf-8"))
    return found


def words(name: str) -> frozenset[str]:
    """The list `name`."""
    return frozenset(_file()[name].split())


def unquoted_languages() -> frozenset[str]:
    """Languages in which a value needs no quotes."""
    return frozenset(_file()["unquoted_languages"])


def key_prefixes() -> dict[str, str]:
    """Literal, lower case → expression of the token that it begins."""
    found: dict[str, str] = _file()["key_prefixes"]
    return found
