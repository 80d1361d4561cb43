"""Reading .gz and .zst files as streams of bytes, with an error where the file was cut off."""

from __future__ import annotations

import gzip
import io
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

ERRORS = (EOFError, OSError, zstandard.ZstdError)
"""What reading a damaged or truncated file may raise."""
BLOCK = 1 << 18


def open_decompressed(path: str | Path) -> BinaryIO:
    """The decompressed bytes of a file, by its suffix. A stream that ends early raises EOFError or ZstdError when read."""
    name = str(path)
    if name.endswith(".gz"):
        return gzip.open(name, "rb")  # type: ignore[return-value]
    if name.endswith(".zst"):
        return io.BufferedReader(_Zstd(name), BLOCK)
    return open(name, "rb")


class _Zstd(io.RawIOBase):
    """zstandard's own reader takes a file cut in mid-frame for one that ends there; this one raises EOFError."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "rb")  # noqa: SIM115  closed with the stream
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._fresh = True
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            block = self._file.read(BLOCK)
            if not block:
                if not self._fresh and not self._frame.eof:
                    raise EOFError("the compressed stream ends in the middle of a frame")
                return 0
            while block:
                if self._frame.eof:  # a further frame
                    self._frame = zstandard.ZstdDecompressor().decompressobj()
                self._fresh = False
                self._ready += self._frame.decompress(block)
                block = self._frame.unused_data if self._frame.eof else b""
        n = min(len(buffer), len(self._ready))
        buffer[:n], self._ready = self._ready[:n], self._ready[n:]
        return n

    def close(self) -> None:
        self._file.close()
        super().close()
