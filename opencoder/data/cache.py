"""Index arrays kept on disk: built once, by whichever process comes first, and mapped by all.

A file is named by a hash of everything its content depends on, and appears whole under that name or not at all. So a
process that finds it uses it, never writes to it (a read-only share will do), and nothing waits for rank 0: one that
finds another process at work waits for that one's file, for a bounded time, and then builds its own, which is the same."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opencoder.files import fsync_directory

from .mapping import map_npy

log = logging.getLogger("opencoder")

FORMAT = 1
"""Raised when the same description would give other arrays."""
POLL_S = 0.05

Arrays = dict[str, NDArray[Any]]


def cache_folder(prefix: str) -> Path:
    """Where the arrays of a dataset are kept if nothing else is asked for; it may be deleted at any time."""
    return Path(f"{prefix}.cache")


class IndexCache:
    """Arrays by description, in `folder`, or in one named by each user of the cache if that is None.

    `rank` of `ranks` processes on this machine: each begins elsewhere in a list of datasets, so that they share the work.
    Only rank 0 says that a folder cannot be written. `patience_s`: how long to wait for another process at work."""

    def __init__(
        self, folder: str | Path | None = None, *, rank: int = 0, ranks: int = 1, patience_s: float = 60.0
    ) -> None:
        self.folder = Path(folder) if folder is not None else None
        self.rank, self.ranks, self.patience_s = rank, ranks, patience_s
        self._told = rank != 0

    def order(self, n: int) -> list[int]:
        """0 … n−1, from this rank's place on."""
        first = self.rank * n // self.ranks
        return [*range(first, n), *range(first)]

    def get(self, home: Path, what: dict[str, Any], names: tuple[str, ...], build: Callable[[], Arrays]) -> Arrays:
        """The arrays `names` that `build` gives for the description `what`: mapped from the cache, or built and put there.

        Where the folder cannot be written they are built in memory. `home` is the folder used if the cache has none."""
        folder = self.folder or home
        key = hashlib.sha256(json.dumps([FORMAT, what], sort_keys=True).encode()).hexdigest()[:32]
        paths = {name: folder / f"{key}-{name}.npy" for name in names}
        found = _load(paths)
        if found is not None:
            return found
        marker = folder / f"{key}.building"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            mine = _claim(marker)
        except OSError as error:
            self._tell(folder, error)
            return build()
        if not mine:
            found = self._wait(marker, paths)
            if found is not None:
                return found
        try:
            return self._build(folder, key, paths, build)
        finally:
            marker.unlink(missing_ok=True)

    def _build(self, folder: Path, key: str, paths: dict[str, Path], build: Callable[[], Arrays]) -> Arrays:
        arrays = build()
        try:
            for name, path in paths.items():
                _write(path, arrays[name])
            fsync_directory(folder)
            for leftover in folder.glob(f".{key}-*.tmp"):  # of a killed process; one still at work finds ours
                leftover.unlink(missing_ok=True)
        except OSError as error:
            found = _load(paths)
            if found is None:
                self._tell(folder, error)
            return found or arrays
        return _load(paths) or arrays

    def _wait(self, marker: Path, paths: dict[str, Path]) -> Arrays | None:
        """The arrays of the process at work, or None if it is dead, gave up, or takes longer than `patience_s`."""
        deadline = time.monotonic() + self.patience_s
        while time.monotonic() < deadline:
            working = _at_work(marker)  # asked first: the marker goes after the files have come
            found = _load(paths)
            if found is not None or not working:
                return found
            time.sleep(POLL_S)
        return None

    def _tell(self, folder: Path, error: OSError) -> None:
        if not self._told:
            self._told = True
            log.warning("index cache %s cannot be written (%s): every process builds its own in memory", folder, error)


def _load(paths: dict[str, Path]) -> Arrays | None:
    """All arrays, or None if one is missing or damaged."""
    try:
        return {name: map_npy(path) for name, path in paths.items()}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        log.warning("index cache: %s; it is made again", error)
        return None


def _write(path: Path, array: NDArray[Any]) -> None:
    """Under a name of this process first: several may write the same file."""
    temporary = path.with_name(f".{path.stem}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.save(file, array)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _claim(marker: Path) -> bool:
    """Whether this process is the first to build; the marker names it."""
    try:
        with open(marker, "x", encoding="utf-8") as file:
            file.write(f"{socket.gethostname()} {os.getpid()}\n")
    except FileExistsError:
        return False
    return True


def _at_work(marker: Path) -> bool:
    """Whether the process that made the marker may still be building."""
    try:
        host, _, pid = marker.read_text(encoding="utf-8").partition(" ")
    except FileNotFoundError:
        return False
    if host != socket.gethostname() or not pid.endswith("\n"):
        return True  # on another machine, or just being written: only patience tells
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # alive, of another user
    return True
