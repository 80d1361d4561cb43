"""Task `licences`: what the licence files of the repositories say, for each shard those of the repositories it has files of."""

from __future__ import annotations

import json
from pathlib import Path

from ..transform.licence import RepositoryLicences


def licences(inputs: list[Path], outputs: list[Path]) -> None:
    """Inputs: of every shard, in JSON, `files`, its licence files as (repository, path, text), and `repositories`, those that
    it has files of. Outputs: for every shard {repository: {folder: licence expression}} in JSON."""
    files: dict[str, list[tuple[str, str]]] = {}
    needed: list[list[str]] = []
    for path in inputs:
        shard = json.loads(path.read_text(encoding="utf-8"))
        needed.append(shard["repositories"])
        for key, name, text in shard["files"]:
            files.setdefault(key, []).append((name, text))
    found = {key: RepositoryLicences(some).folders for key, some in files.items()}
    for path, keys in zip(outputs, needed, strict=True):
        path.write_text(json.dumps({key: found[key] for key in keys if key in found}, sort_keys=True), encoding="utf-8")


def repository_key(source: str, repo: str | None) -> str:
    """What licence files hold for: a repository, or the whole input where none is known."""
    return f"{source}\0{repo or ''}"
