"""Reading compressed files as streams of bytes in bounded memory, with an error where the file was cut off."""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

ERRORS = (EOFError, OSError, zstandard.ZstdError, zlib.error, lzma.LZMAError)
"""What reading a damaged or truncated file may raise."""
BLOCK = 1 << 18
"""Bytes read from the file, and decompressed at most, at a time."""
ZSTD_PIECE = 1 << 11
"""Compressed bytes given to zstd at a time. Its stream object has no limit on what it returns, and four bytes can
stand for a block of 128 KiB, so this bounds the output of one call to 64 MiB."""
XZ_MEMORY = 256 << 20
"""Bytes an xz stream may ask for; `xz -9` needs 65 MiB, a hostile header could ask for 4 GiB."""


def open_decompressed(path: str | Path) -> BinaryIO:
    """The decompressed bytes of a file, by its suffix. A stream that ends early raises EOFError when read."""
    file = open(path, "rb")  # noqa: SIM115  closed with the stream
    return decompressed(file, str(path))


def decompressed(file: BinaryIO, name: str) -> BinaryIO:
    """The decompressed bytes of an open file whose format the suffix of `name` tells (.gz .tgz .zst .tzst .xz .txz
    .bz2 .tbz2; anything else: the file itself). Closing the stream closes the file."""
    codec = next((codec for suffixes, codec in _CODECS if name.lower().endswith(suffixes)), None)
    return file if codec is None else io.BufferedReader(_Inflated(file, codec), BLOCK)


class _Zlib:
    """gzip members, one after the other; zlib checks their CRC."""

    def __init__(self) -> None:
        self._member = zlib.decompressobj(31)
        self.eof = False
        self.unused = b""

    def decompress(self, data: bytes) -> bytes:
        out = self._member.decompress(self._member.unconsumed_tail + data, BLOCK)
        self.eof, self.unused = self._member.eof, self._member.unused_data
        return out

    @property
    def hungry(self) -> bool:
        return not self._member.unconsumed_tail


class _Limited:
    """bz2 and xz: both keep what does not fit into one call."""

    def __init__(self, stream: bz2.BZ2Decompressor | lzma.LZMADecompressor) -> None:
        self._stream = stream

    def decompress(self, data: bytes) -> bytes:
        return self._stream.decompress(data, BLOCK)

    @property
    def eof(self) -> bool:
        return self._stream.eof

    @property
    def unused(self) -> bytes:
        return self._stream.unused_data

    @property
    def hungry(self) -> bool:
        return self._stream.needs_input


class _Zstd:
    """A zstd frame, fed in small pieces."""

    def __init__(self) -> None:
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._waiting = b""
        self.unused = b""

    def decompress(self, data: bytes) -> bytes:
        self._waiting += data
        piece, self._waiting = self._waiting[:ZSTD_PIECE], self._waiting[ZSTD_PIECE:]
        out = self._frame.decompress(piece)
        if self._frame.eof:
            self.unused = self._frame.unused_data + self._waiting
        return out

    @property
    def eof(self) -> bool:
        return self._frame.eof

    @property
    def hungry(self) -> bool:
        return not self._waiting


_Codec = _Zlib | _Limited | _Zstd
_CODECS: tuple[tuple[tuple[str, ...], Callable[[], _Codec]], ...] = (
    ((".gz", ".tgz", ".crate"), _Zlib),
    ((".zst", ".tzst"), _Zstd),
    ((".xz", ".txz"), lambda: _Limited(lzma.LZMADecompressor(memlimit=XZ_MEMORY))),
    ((".bz2", ".tbz2"), lambda: _Limited(bz2.BZ2Decompressor())),
)


class _Inflated(io.RawIOBase):
    """Frames (gzip members, bz2 or xz streams) one after the other. The library's own readers differ in what they make
    of a file cut in mid-frame, some take it for one that ends there; this one always raises EOFError."""

    def __init__(self, file: BinaryIO, codec: Callable[[], _Codec]) -> None:
        self._file, self._codec = file, codec
        self._frame: _Codec | None = None
        self._input = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def _more(self) -> bool:
        """Decompress a little; False at the end of the file."""
        if self._frame is None and not self._next_frame():
            return False
        assert self._frame is not None
        data, ended = b"", False
        if self._frame.hungry:
            data, self._input = self._input or self._file.read(BLOCK), b""
            ended = not data
        out = self._frame.decompress(data)  # at the end of the file too: zlib may hold finished output back
        if self._frame.eof:
            self._input, self._frame = self._frame.unused, None
        elif ended and not out:
            raise EOFError("the compressed stream ends in the middle of a frame")
        self._ready = memoryview(out)
        return True

    def _next_frame(self) -> bool:
        """Begin a frame if there is one. Zero bytes between frames are padding that gzip and xz allow."""
        self._input = self._input.lstrip(b"\0")
        while not self._input:
            block = self._file.read(BLOCK)
            if not block:
                return False
            self._input = block.lstrip(b"\0")
        self._frame = self._codec()
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if not self._more():
                return 0
        n = min(len(buffer), len(self._ready))
        buffer[:n] = self._ready[:n]
        self._ready = self._ready[n:]
        return n

    def close(self) -> None:
        self._file.close()
        super().close()
