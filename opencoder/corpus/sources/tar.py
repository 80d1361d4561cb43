"""Tar archives, read as a stream: one member in memory at a time, nothing written to disk, no link followed.

The headers are decoded by the standard library, but the walk is ours: `tarfile` takes a damaged header for the end of
the archive, reads extended headers of any size into memory, and keeps every member it has seen."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from typing import BinaryIO

from opencoder.compressed import ERRORS, decompressed
from opencoder.corpus_config import CorpusConfig

from .items import Item
from .limits import BLOCK, DamageError, LimitError, Meter, judge_stream, member_record
from .opening import open_binary
from .record import Record, judge_link, what

HEADER = tarfile.BLOCKSIZE
EXTENDED_BYTES = 1 << 20
"""Longest extended header (pax records, GNU long name) that is read."""
_ZEROS = bytes(HEADER)
_NAMES = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


class Stream:
    """Reads an unpacked tar exactly, in step with a Meter."""

    def __init__(self, file: BinaryIO, meter: Meter) -> None:
        self._file, self._meter = file, meter

    def take(self, size: int) -> bytes:
        """`size` bytes. Raises DamageError if the archive ends before."""
        self._meter.add(size)
        data = self._file.read(size)
        while len(data) < size:
            more = self._file.read(size - len(data))
            if not more:
                raise DamageError(f"it ends {size - len(data):,} bytes too early")
            data += more
        return data

    def skip(self, size: int) -> None:
        """Pass over `size` bytes."""
        while size > 0:
            size -= len(self.take(min(size, BLOCK)))

    def rest(self) -> int:
        """Read to the end; the number of bytes up to the last that is not zero."""
        count = last = 0
        while block := self._file.read(BLOCK):
            self._meter.add(len(block))
            if kept := len(block.rstrip(b"\0")):
                last = count + kept
            count += len(block)
        return last


def read_tar(item: Item, config: CorpusConfig) -> Iterator[Record]:
    """A record for each member but folders. An archive that is damaged or goes beyond a limit gives the members before,
    and one failure that says where it stopped."""
    last = "its beginning"
    try:
        with open_binary(item.file) as packed, decompressed(packed, item.file) as file:
            meter = Meter(config.read.archive, packed.tell)
            stream = Stream(file, meter)
            for info in _members(stream):
                meter.member()
                if not info.isdir():
                    record = _member(item, info, stream, meter, config)
                    last = record.path
                    yield record
            if trailing := stream.rest():
                raise DamageError(
                    f"{trailing:,} bytes follow the end mark (archives joined end to end?); they were not read"
                )
    except (*ERRORS, DamageError) as error:
        yield Record(item.path, item.source).fail(f"damaged or truncated after {last}: {what(error)}")
    except LimitError as error:
        yield Record(item.path, item.source).fail(f"given up after {last}: {error}")


def _padded(size: int) -> int:
    return -(-size // HEADER) * HEADER


def _member(item: Item, info: tarfile.TarInfo, stream: Stream, meter: Meter, config: CorpusConfig) -> Record:
    record = member_record(item, info.name, config)
    record.size_bytes = info.size
    # Links, folders, devices and pipes have no data, whatever size their header states; unknown types do.
    has_data = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES
    refusal = None
    if info.pax_headers or info.type == tarfile.GNUTYPE_SPARSE:
        refusal = "a sparse file; pack it without holes"
    elif not info.isreg():
        refusal = "not a regular file"
    refusal = refusal or meter.refusal(info.size)
    link = info.issym() or info.islnk()
    if refusal or record.status == "failed":
        stream.skip(_padded(info.size) if has_data else 0)
        if record.status == "failed":
            return record
        return judge_link(record, info.linkname) if link else record.fail(refusal or "")
    judge_stream(record, info.size, stream.take, config)
    stream.skip(-info.size % HEADER)
    return record


def _members(stream: Stream) -> Iterator[tarfile.TarInfo]:
    """Headers with the extended ones before them applied. The caller takes each member's data before the next."""
    everywhere: dict[str, str] = {}
    extended: dict[str, str] = {}
    while (block := stream.take(HEADER)) != _ZEROS:
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise DamageError(f"a header is damaged ({error})") from None
        if info.size < 0:
            raise DamageError(f"a header states a size of {info.size}")
        if info.type == tarfile.XGLTYPE:
            everywhere |= _pax(_extended(stream, info.size))
        elif info.type in _NAMES:
            data = _extended(stream, info.size)
            if info.type == tarfile.GNUTYPE_LONGNAME:
                extended["path"] = _text(data)
            elif info.type == tarfile.GNUTYPE_LONGLINK:
                extended["linkpath"] = _text(data)
            else:
                extended |= _pax(data)
        else:
            _apply(info, everywhere | extended)
            if info.type == tarfile.GNUTYPE_SPARSE:
                _skip_sparse_headers(block, stream)
            extended = {}
            yield info


def _extended(stream: Stream, size: int) -> bytes:
    if size > EXTENDED_BYTES:
        raise LimitError(f"an extended header of {size:,} bytes, more than {EXTENDED_BYTES:,}")
    return stream.take(_padded(size))[:size]


def _text(data: bytes) -> str:
    return data.rstrip(b"\0").decode("utf-8", "surrogateescape")


def _pax(data: bytes) -> dict[str, str]:
    """Records `LENGTH KEY=VALUE\\n`, LENGTH counting the whole record (POSIX pax interchange format)."""
    found: dict[str, str] = {}
    at = 0
    while at < len(data) and data[at] != 0:
        blank = data.find(b" ", at, at + 20)
        digits = data[at:blank]
        end = at + int(digits) if blank > at and digits.isdigit() else 0
        key, equals, value = data[blank + 1 : end - 1].partition(b"=")
        if not (blank < end <= len(data)) or not equals or data[end - 1 : end] != b"\n":
            raise DamageError("an extended header is damaged")
        found[_text(key)] = value.decode("utf-8", "surrogateescape")
        at = end
    return found


def _apply(info: tarfile.TarInfo, extended: dict[str, str]) -> None:
    """Put extended values in the place of the header's. `pax_headers` is left non-empty for sparse members only."""
    info.name = extended.get("path", info.name)
    info.linkname = extended.get("linkpath", info.linkname)
    if (size := extended.get("size")) is not None:
        if not re.fullmatch(r"[0-9]{1,18}", size):
            raise DamageError(f"an extended header states a size of {size[:40]!r}")
        info.size = int(size)
    info.pax_headers = {key: value for key, value in extended.items() if key.startswith("GNU.sparse.")}
    if info.type == tarfile.AREGTYPE and info.name.endswith("/"):  # the way of tar before POSIX
        info.type = tarfile.DIRTYPE
    info.name = info.name.rstrip("/") or info.name


def _skip_sparse_headers(block: bytes, stream: Stream) -> None:
    """Old GNU sparse headers go on in further blocks while a flag says so."""
    more = block[482]
    while more:
        more = stream.take(HEADER)[504]
