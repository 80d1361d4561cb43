"""SHA-256 of the files that tasks read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from opencoder.errors import DataError
from opencoder.files import sha256_of, write_json

from .task import MANIFEST, read_manifest


class Digests:
    """SHA-256 of input files: from manifests, or worked out and remembered by size and modification time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "digests.json"
        self.produced: dict[str, str] = {}
        self.changed = False
        try:
            self.known: dict[str, list[Any]] = json.loads(self.path.read_bytes())
        except (FileNotFoundError, ValueError):
            self.known = {}

    def of(self, path: str) -> str:
        """The digest of a file. Raises DataError if it does not exist."""
        if path in self.produced:
            return self.produced[path]
        try:
            status = os.stat(self.folder / path)
        except OSError as error:
            raise DataError(f"input {self.folder / path} cannot be read: {error.strerror}") from error
        recorded = self._recorded(path, status)
        if recorded is not None:
            return recorded
        known = self.known.get(path)
        if known is None or known[:2] != [status.st_size, status.st_mtime_ns]:
            known = [status.st_size, status.st_mtime_ns, sha256_of(self.folder / path)]
            self.known[path] = known
            self.changed = True
        return str(known[2])

    def _recorded(self, path: str, status: os.stat_result) -> str | None:
        """From the manifest of an earlier run's task, if the file is still as it was."""
        name, _, suffix = path.partition(".")
        if os.path.isabs(path) or suffix == MANIFEST:
            return None
        manifest = read_manifest(self.folder, name)
        if manifest is None or path not in manifest["outputs"]:
            return None
        same = manifest["outputs"][path]["size"] == status.st_size
        same = same and manifest["measured"]["mtime_ns"][path] == status.st_mtime_ns
        return str(manifest["outputs"][path]["sha256"]) if same else None

    def save(self) -> None:
        """Remember for the next run."""
        if self.changed:
            write_json(self.path, self.known)
