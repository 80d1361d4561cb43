"""The oracle: real files and the answers of the published filter on them. It lies beside the clone (../shared/oracle) or where
OPENCODER_ORACLE says."""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import zstandard

ANSWERS = "visible.jsonl.zst"


@cache
def folder() -> Path | None:
    """Where the oracle lies, or None."""
    candidates = [Path(os.environ["OPENCODER_ORACLE"])] if "OPENCODER_ORACLE" in os.environ else []
    root = Path(__file__).parents[2]
    candidates.append(root.parent / "shared" / "oracle")
    git = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "--git-common-dir"], capture_output=True, text=True, check=False
    )
    if git.returncode == 0:  # a linked checkout: beside the main one
        candidates.append((root / git.stdout.strip()).resolve().parents[1] / "shared" / "oracle")
    return next((c for c in candidates if (c / ANSWERS).is_file()), None)


needs_oracle = pytest.mark.skipif(folder() is None, reason="no oracle beside the clone and OPENCODER_ORACLE is not set")


def path_of(name: str) -> Path:
    """A file of the oracle, which must be there."""
    root = folder()
    assert root is not None
    return root / name


def truths() -> Iterator[dict[str, Any]]:
    """One object per file: path, program_lang, doc_type, size, signals, hits, effective."""
    with path_of(ANSWERS).open("rb") as file:
        for line in io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file), "utf-8"):
            yield json.loads(line)


@contextmanager
def _archive() -> Iterator[tarfile.TarFile]:
    """The files, as a stream."""
    with (
        path_of("corpus.tar.zst").open("rb") as file,
        tarfile.open(fileobj=zstandard.ZstdDecompressor().stream_reader(file), mode="r|") as archive,
    ):
        yield archive


def unpack(target: Path) -> Path:
    """The files, under `target`; returns the folder that the paths are relative to."""
    with _archive() as archive:
        archive.extractall(target, filter="data")
    return target / "corpus"


@cache
def _texts() -> dict[str, str]:
    """Path → text, every line end a single newline."""
    found = {}
    with _archive() as archive:
        for member in archive:
            if member.isfile() and (content := archive.extractfile(member)) is not None:
                text = content.read().decode("utf-8", "replace")
                found[member.name.removeprefix("corpus/")] = text.replace("\r\n", "\n").replace("\r", "\n")
    return found


def files(language: str) -> list[tuple[dict[str, Any], str]]:
    """Answer and text of each file of a language."""
    return [(truth, _texts()[truth["path"]]) for truth in truths() if truth["program_lang"] == language]
