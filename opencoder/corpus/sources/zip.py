"""Zip archives and wheels: members one at a time, nothing written to disk, no link followed.

The table of members lies at the end, so it is known before anything is unpacked what an archive claims. It takes about
0.6 KB of memory per member while the archive is open."""

from __future__ import annotations

import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from opencoder.corpus_config import CorpusConfig

from .items import Item
from .limits import DamageError, LimitError, Meter, judge_stream, member_record
from .opening import open_binary
from .record import Record, judge_link, what

DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    OSError,
    EOFError,
    ValueError,
    NotImplementedError,
    RuntimeError,
    struct.error,
)
"""What reading a damaged or foreign archive may raise."""
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)
"""LZMA is left out: its header may ask for gigabytes."""
UNIX = 3
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR_BYTES = 20
LINK_BYTES = 4096
LOCAL_HEADER = 30
"""Bytes of a local header without name and extra field (APPNOTE 4.3.7)."""


def read_zip(item: Item, config: CorpusConfig) -> Iterator[Record]:
    """A record for each member but folders (of those of the item's part). An archive that is damaged as a whole or goes
    beyond a limit gives the members before, and one failure."""
    last = "its beginning" if item.parts == 1 else f"the beginning of part {item.part + 1} of {item.parts}"
    try:
        with open_binary(item.file) as file:
            limits = config.read.archive
            if (claimed := _member_count(file)) > limits.max_members:
                raise LimitError(f"{claimed:,} members, more than {limits.max_members:,} (read.archive.max_members)")
            with zipfile.ZipFile(file) as archive:
                infos = archive.infolist()
                if len(infos) != claimed:
                    raise DamageError(
                        f"its table has {len(infos):,} members and states {claimed:,}; nothing of it was read"
                    )
                _check_overlap(infos)
                meter = Meter(limits, lambda: item.size)
                for info in infos[len(infos) * item.part // item.parts : len(infos) * (item.part + 1) // item.parts]:
                    if not info.is_dir() or info.file_size:
                        record = _member(item, archive, info, meter, config)
                        last = record.path
                        yield record
    except (*DAMAGE, DamageError) as error:
        yield Record(item.path, item.source).fail(f"damaged or truncated after {last}: {what(error)}")
    except LimitError as error:
        yield Record(item.path, item.source).fail(f"given up after {last}: {error}")


def _member(item: Item, archive: zipfile.ZipFile, info: zipfile.ZipInfo, meter: Meter, config: CorpusConfig) -> Record:
    # `orig_filename` has what `filename` hides: everything from a NUL byte on.
    record = member_record(item, info.filename if "\0" not in info.orig_filename else info.orig_filename, config)
    record.size_bytes = info.file_size
    if record.status == "failed":
        return record
    if info.flag_bits & 1:
        return record.fail("encrypted; only what needs no password is read")
    if info.compress_type not in METHODS:
        return record.fail(f"compression method {info.compress_type} is not read; pack it with deflate")
    if (refusal := meter.refusal(info.file_size, info.compress_size)) is not None:
        return record.fail(refusal)
    try:
        with archive.open(info) as file:
            if info.create_system == UNIX and stat.S_ISLNK(info.external_attr >> 16):
                return judge_link(record, file.read(LINK_BYTES).decode("utf-8", "surrogateescape"))

            def take(size: int) -> bytes:
                meter.add(size)
                data = file.read(size)
                if len(data) != size:
                    raise DamageError(f"{size - len(data):,} of {info.file_size:,} bytes are missing")
                return data

            judge_stream(record, info.file_size, take, config)
            if file.read(1):  # also the moment at which the checksum of an empty or exactly read member is compared
                raise DamageError("more bytes than the archive's table states")
    except (*DAMAGE, DamageError) as error:
        return record.fail(f"damaged: {what(error)}")
    return record


def _member_count(file: BinaryIO) -> int:
    """Members by the end record (APPNOTE 4.3.16, 4.3.14 for zip64); 0 if there is none: the library will say so."""
    file.seek(0, 2)
    size = file.tell()
    start = max(0, size - _END.size - 0xFFFF - _LOCATOR_BYTES - _END64.size)
    file.seek(start)
    tail = file.read(size - start)
    at = tail.rfind(b"PK\x05\x06")
    count = 0
    if at >= 0 and at + _END.size <= len(tail):
        count = _END.unpack_from(tail, at)[4]
        at64 = tail.rfind(b"PK\x06\x06", 0, at)
        if count == 0xFFFF and at64 >= 0 and at64 + _END64.size <= len(tail):
            count = _END64.unpack_from(tail, at64)[7]
    file.seek(0)
    return int(count)


def _check_overlap(infos: list[zipfile.ZipInfo]) -> None:
    """Members that share packed bytes are the way of bombs that need no nesting (Fifield 2019). Raises DamageError."""
    end = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.header_offset < end:
            raise DamageError(f"members overlap (at {info.filename[:200]!r}); nothing of it was read")
        end = info.header_offset + LOCAL_HEADER + len(info.orig_filename) + info.compress_size
