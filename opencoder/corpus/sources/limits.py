"""Limits that all archives share: what one may unpack to, and which names its members may have."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable

from opencoder.corpus_config import ArchiveConfig, CorpusConfig

from .items import Item
from .record import Record, judge_bytes, judge_large, printable

RATIO_FROM = 64 << 20
"""Unpacked bytes from which on the ratio is judged: a small archive of zeros is no danger."""
BLOCK = 1 << 20
_DRIVE = re.compile(r"[A-Za-z]:")


class LimitError(Exception):
    """An archive goes beyond a limit; the text names the limit and its value."""


class DamageError(Exception):
    """An archive or member is not what it says it is."""


class Meter:
    """Counts what an archive has unpacked to. Every method raises LimitError beyond the limits."""

    def __init__(self, limits: ArchiveConfig, packed: Callable[[], int]) -> None:
        self._limits, self._packed = limits, packed
        self.members = 0
        self.unpacked = 0

    def member(self) -> None:
        """One more member, of any kind."""
        self.members += 1
        if self.members > self._limits.max_members:
            raise LimitError(f"more than {self._limits.max_members:,} members (read.archive.max_members)")

    def add(self, count: int) -> None:
        """`count` more unpacked bytes."""
        self.unpacked += count
        if self.unpacked > self._limits.max_total_bytes:
            raise LimitError(
                f"unpacks to more than {self._limits.max_total_bytes:,} bytes (read.archive.max_total_bytes)"
            )
        if self.unpacked > RATIO_FROM and self.unpacked > self._limits.max_ratio * max(1, self._packed()):
            raise LimitError(
                f"{self.unpacked:,} bytes from {self._packed():,} packed ones, more than {self._limits.max_ratio:g} to 1 "
                "(read.archive.max_ratio)"
            )

    def refusal(self, size: int, packed: int | None = None) -> str | None:
        """Why a member of this size is not unpacked at all, if so."""
        limits = self._limits
        if size > limits.max_member_bytes:
            most = f"{limits.max_member_bytes:,} (read.archive.max_member_bytes)"
            return f"a member of {size:,} bytes is not unpacked: more than {most}"
        if packed is not None and size > RATIO_FROM and size > limits.max_ratio * max(1, packed):
            return (
                f"a member of {size:,} bytes from {packed:,} packed ones is not unpacked: more than "
                f"{limits.max_ratio:g} to 1 (read.archive.max_ratio)"
            )
        return None


def unsafe(name: str) -> str | None:
    """What is wrong with a member's name, if it would lead out of the archive's folder when unpacked."""
    parts = re.split(r"[/\\]", name)
    if "\0" in name:
        return "holds a NUL byte"
    if parts[0] == "" or _DRIVE.match(name):
        return "is an absolute path"
    if ".." in parts:
        return "leads out of the archive (`..`)"
    return None


def member_record(item: Item, name: str, config: CorpusConfig) -> Record:
    """The record of a member, failed at once if its name is unsafe."""
    clean = "/".join(part for part in name.split("/") if part not in ("", "."))
    record = Record(item.prefix + printable(clean or name), item.source)
    if (fault := unsafe(name)) is not None:
        record.path = item.prefix + printable(name.replace("\0", "\\x00"))
        return record.fail(f"the name of the member {fault}; it was not read")
    record.repo = item.repo_of(record.path, config.read)
    return record


def judge_stream(record: Record, size: int, read: Callable[[int], bytes], config: CorpusConfig) -> Record:
    """Judge a member whose bytes `read(n)` gives (all n of them, or it raises): whole if it is within `max_bytes`,
    otherwise hashed in blocks."""
    if size <= config.max_bytes:
        return judge_bytes(record, read(size), config)
    digest = hashlib.sha256()
    left = size
    while left:
        block = read(min(left, BLOCK))
        digest.update(block)
        left -= len(block)
    return judge_large(record, size, digest.hexdigest(), config)
