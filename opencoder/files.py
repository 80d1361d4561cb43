"""Writing that survives a crash: a file appears whole under its final name or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

try:
    from isal.isal_zlib import crc32
except ImportError:  # no wheel for this machine (pyproject.toml): the same sum, at a third of the speed
    from zlib import crc32


def fsync_directory(path: Path) -> None:
    """Make renames inside `path` durable (a rename is only safe once its directory is on disk)."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def temporary_name(path: Path) -> Path:
    """The name a file carries while it is written. One per target, so a re-run overwrites the leftovers of a kill."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`; if the block succeeds it is synced and renamed, otherwise removed."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(target)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(target.parent)


@contextmanager
def atomic_open(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """`open` for writing ("w" or "wb") with the guarantee of `atomic_path`."""
    encoding = None if "b" in mode else "utf-8"
    with atomic_path(path) as temporary, open(temporary, mode, encoding=encoding) as file:
        yield file


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_open(path) as file:
        file.write(text)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys (repeatable bytes), atomically."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def replace_directory(temporary: Path, target: Path) -> None:
    """Give the finished folder `temporary` its final name `target`, durably.

    An older `target` is moved aside before and removed after: at every moment one of the two is whole, under its own
    name or under `retired_name(target)`."""
    for root, _, names in os.walk(temporary):
        for name in names:
            with open(os.path.join(root, name), "rb") as file:
                os.fsync(file.fileno())
        fsync_directory(Path(root))
    retired = retired_name(target)
    if target.exists():
        if retired.exists():
            shutil.rmtree(retired)
        os.replace(target, retired)
    os.replace(temporary, target)
    fsync_directory(target.parent)
    if retired.exists():
        shutil.rmtree(retired)


def retired_name(path: Path) -> Path:
    """The name a folder carries while it is removed: a kill in between leaves no half of it under its own name."""
    return path.with_name(f".{path.name}.old")


def remove_directory(path: Path) -> None:
    """Remove a folder so that it is either whole or gone under its own name, whenever the process may die."""
    retired = retired_name(path)
    if retired.exists():
        shutil.rmtree(retired)
    os.replace(path, retired)
    fsync_directory(path.parent)
    shutil.rmtree(retired)


class FileFacts(NamedTuple):
    """What a file must hold."""

    bytes: int
    crc32: str
    """Eight hexadecimal digits."""


def facts_of(path: Path) -> FileFacts:
    """Size and CRC-32 of a file, read in blocks."""
    size = crc = 0
    buffer = bytearray(4 << 20)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while n := file.readinto(buffer):
            crc = crc32(view[:n], crc)
            size += n
    return FileFacts(size, f"{crc:08x}")


def sha256_of(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
