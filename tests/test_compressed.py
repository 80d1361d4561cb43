"""Compressed streams: equal to the library's own readers, cut anywhere, and bounded in memory."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import tracemalloc
from collections.abc import Callable

import pytest
import zstandard

from opencoder.compressed import ERRORS, decompressed

pytestmark = pytest.mark.fast
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "x.gz": gzip.compress,
    "x.zst": zstandard.compress,
    "x.xz": lzma.compress,
    "x.bz2": bz2.compress,
}


def read(data: bytes, name: str) -> bytes:
    with decompressed(io.BytesIO(data), name) as stream:
        return stream.read()


def content(kind: str) -> bytes:
    draw = random.Random(kind)
    if kind == "noise":
        return draw.randbytes(700_000)
    if kind == "zeros":
        return bytes(3_000_000)
    if kind == "empty":
        return b""
    return b"".join(b"line %d of %d\n" % (draw.randrange(1000), draw.randrange(50)) for _ in range(40_000))


@pytest.mark.parametrize("kind", ["noise", "zeros", "empty", "lines"])
@pytest.mark.parametrize("name", PACKERS)
def test_streams_of_any_length_come_back(name: str, kind: str) -> None:
    data = content(kind)
    pack = PACKERS[name]
    assert read(pack(data), name) == data
    assert read(pack(data) + pack(b"x") + pack(data), name) == data + b"x" + data
    with decompressed(io.BytesIO(pack(data)), name) as stream:
        assert b"".join(stream) == data  # by lines


@pytest.mark.parametrize("name", PACKERS)
def test_a_stream_cut_anywhere_or_followed_by_noise_is_an_error(name: str) -> None:
    packed = PACKERS[name](content("lines")[:30_000])
    for cut in (1, 2, 5, 9, len(packed) // 3, len(packed) // 2, len(packed) - 9, len(packed) - 1):
        with pytest.raises(ERRORS):
            read(packed[:cut], name)
    with pytest.raises(ERRORS):
        read(packed + b"\x01 not a frame", name)


@pytest.mark.parametrize("name", PACKERS)
def test_zero_bytes_after_a_frame_are_padding(name: str) -> None:
    packed = PACKERS[name](b"text")
    assert read(packed + bytes(600_000) + packed, name) == b"texttext"


@pytest.mark.parametrize("name", PACKERS)
def test_a_bomb_is_unpacked_in_bounded_memory(name: str) -> None:
    """All but zstd give blocks; of zstd at most 64 MiB come from one piece of its input."""
    size, bound = (1 << 28, 90 << 20) if name == "x.zst" else (1 << 25, 12 << 20)  # xz has a dictionary of 8 MiB
    packed = PACKERS[name](bytes(size))
    tracemalloc.start()
    with decompressed(io.BytesIO(packed), name) as stream:
        assert len(stream.read(1 << 20)) == 1 << 20
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < bound


def test_other_names_are_read_as_they_are() -> None:
    assert read(b"\x1f\x8b", "x.txt") == b"\x1f\x8b"
