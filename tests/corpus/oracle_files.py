"""The oracle's files by language, each with the published filter's answer."""

from __future__ import annotations

import tarfile
from functools import cache
from typing import Any

import pytest
import zstandard

from . import oracle

needs_oracle = pytest.mark.skipif(
    oracle.folder() is None, reason="no oracle beside the clone and OPENCODER_ORACLE is not set"
)


@cache
def _texts() -> dict[str, str]:
    """Path → text, every line end a single newline."""
    root = oracle.folder()
    assert root is not None
    found = {}
    with (
        (root / "corpus.tar.zst").open("rb") as file,
        tarfile.open(fileobj=zstandard.ZstdDecompressor().stream_reader(file), mode="r|") as archive,
    ):
        for member in archive:
            if member.isfile() and (content := archive.extractfile(member)) is not None:
                text = content.read().decode("utf-8", "replace")
                found[member.name.removeprefix("corpus/")] = text.replace("\r\n", "\n").replace("\r", "\n")
    return found


def files(language: str) -> list[tuple[dict[str, Any], str]]:
    """Answer and text of each file of a language."""
    return [(truth, _texts()[truth["path"]]) for truth in oracle.truths() if truth["program_lang"] == language]
