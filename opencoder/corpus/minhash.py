"""MinHash signatures (Broder 1997): the share of equal slots of two texts estimates the Jaccard similarity of their
shingle sets.

Tokens are the non-empty parts of re.split(r"\\W+", text.lower()); a shingle is `ngram` tokens joined by one space, in
UTF-8. A text with fewer tokens is one shingle of all of them; one without tokens gives an all-max row that is never
clustered. Schemes: `affine32` and `legacy` equal datasketch 2.0 (SHA-1 per shingle); `fast` uses affine32's
permutations over a 64-bit rolling hash of token hashes."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from opencoder.native import text_engine

SCHEMES = ("affine32", "legacy", "fast")
PRIME = np.uint64((1 << 61) - 1)
EMPTY = 0xFFFFFFFF
"""Value of every slot of a text without tokens."""
_MASK = (1 << 64) - 1
_BASE = 0x9E3779B97F4A7C15


Texts: TypeAlias = Sequence[str] | pa.Array | pa.ChunkedArray
"""A batch of texts: strings, or an Arrow column of them, of which no Python object is made per text. Null is empty."""


def strings(texts: Iterable[str] | Texts) -> list[str]:
    """The texts as a list of str."""
    if isinstance(texts, pa.Array | pa.ChunkedArray):
        return [text or "" for text in texts.to_pylist()]
    return texts if isinstance(texts, list) else list(texts)


def engine_texts(texts: Iterable[str] | Texts) -> Any:
    """What the C++ engine takes as texts: a list of str, or (offsets, bytes) of an Arrow column."""
    if isinstance(texts, pa.ChunkedArray):
        texts = texts.combine_chunks()
    if not isinstance(texts, pa.Array):
        return strings(texts)
    if not pa.types.is_large_string(texts.type):
        texts = texts.cast(pa.large_string())
    _, offsets, data = texts.buffers()
    if len(texts) == 0 or offsets is None:
        return (np.zeros(len(texts) + 1, np.int64), b"")
    found = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    return (found, b"" if data is None else data)


def tokens(text: str) -> list[str]:
    """The words of a text, lower-cased."""
    return [part for part in re.split(r"\W+", text.lower()) if part]


def shingles(text: str, ngram: int) -> set[bytes]:
    """The set of shingles of a text."""
    words = [word.encode("utf-8", "surrogatepass") for word in tokens(text)]
    if not words:
        return set()
    n = min(ngram, len(words))
    return {b" ".join(words[i : i + n]) for i in range(len(words) - n + 1)}


def signatures(
    texts: Iterable[str] | Texts, *, num_perm: int, ngram: int, scheme: str = "affine32", seed: int = 1
) -> NDArray[Any]:
    """(documents, num_perm) signatures of texts: uint32, or uint64 for `legacy`. Raises ValueError for a bad argument."""
    check_arguments(num_perm, scheme, ngram)
    a, b = permutations_of(num_perm, scheme, seed)
    engine = _engine()
    if engine is not None:
        found: NDArray[Any] = engine.minhash_texts(engine_texts(texts), a, b, ngram, scheme)
        return found
    return plain_signatures(strings(texts), a, b, ngram, scheme)


def plain_signatures(
    texts: Sequence[str], a: NDArray[np.uint64], b: NDArray[np.uint64], ngram: int, scheme: str
) -> NDArray[Any]:
    """(documents, len(a)) signatures under the given permutations, without the C++ engine."""
    if scheme == "fast":
        return np.array([_fast_row(text, ngram, a, b) for text in texts], np.uint32).reshape(len(texts), len(a))
    return _by_datasketch([shingles(text, ngram) for text in texts], a, b, scheme)


def signatures_of_shingles(
    sets_of_bytes: Sequence[Iterable[bytes]], *, num_perm: int, scheme: str = "affine32", seed: int = 1
) -> NDArray[Any]:
    """(documents, num_perm) signatures of sets of shingles; `affine32` or `legacy`."""
    check_arguments(num_perm, scheme, 1)
    if scheme == "fast":
        raise ValueError("scheme fast hashes tokens, not shingles: use affine32 or legacy")
    engine = _engine()
    if engine is not None:
        a, b = permutations(num_perm, scheme, seed)
        found: NDArray[Any] = engine.minhash_shingles([list(s) for s in sets_of_bytes], a, b, scheme)
        return found
    return _by_datasketch(sets_of_bytes, *permutations(num_perm, scheme, seed), scheme)


def _by_datasketch(
    sets_of_bytes: Sequence[Iterable[bytes]], a: NDArray[np.uint64], b: NDArray[np.uint64], scheme: str
) -> NDArray[Any]:
    from datasketch import MinHash

    dtype = np.uint64 if scheme == "legacy" else np.uint32
    rows = np.empty((len(sets_of_bytes), len(a)), dtype)
    ready = (a.astype(dtype), b.astype(dtype))
    for row, shingle_set in zip(rows, sets_of_bytes, strict=True):
        sketch = MinHash(num_perm=len(a), scheme=scheme, permutations=ready)
        items = list(shingle_set)
        if items:
            sketch.update_batch(items)
        row[:] = sketch.hashvalues
    return rows


def check_arguments(num_perm: int, scheme: str, ngram: int) -> None:
    """Raises ValueError where one is out of range."""
    if scheme not in SCHEMES:
        raise ValueError(f"scheme={scheme!r}; allowed: {', '.join(SCHEMES)}")
    if num_perm < 1 or ngram < 1:
        raise ValueError(f"num_perm={num_perm} and ngram={ngram} must be at least 1")


def permutations_of(num_perm: int, scheme: str, seed: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Those of a scheme; `fast` has affine32's."""
    return permutations(num_perm, "affine32" if scheme == "fast" else scheme, seed)


@lru_cache(maxsize=16)
def permutations(num_perm: int, scheme: str, seed: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Multipliers and offsets of datasketch's permutations: its generator, its order of draws."""
    random = np.random.RandomState(seed)
    if scheme == "affine32":
        a = random.randint(0, 1 << 31, num_perm, np.uint32).astype(np.uint64) * 2 + 1
        return a, random.randint(0, 1 << 32, num_perm, np.uint32).astype(np.uint64)
    pairs = [
        (random.randint(1, int(PRIME), dtype=np.uint64), random.randint(0, int(PRIME), dtype=np.uint64))
        for _ in range(num_perm)
    ]
    table = np.array(pairs, dtype=np.uint64).reshape(num_perm, 2)
    return table[:, 0].copy(), table[:, 1].copy()


@cache
def _engine() -> Any:
    """The C++ engine with Python's own tables of word characters and lower case, or None."""
    engine = text_engine()
    if engine is not None:
        points = list(map(chr, range(sys.maxunicode + 1)))
        word = bytearray(map(str.isalnum, points))
        word[ord("_")] = 1
        lower = [(i, low) for i, (c, low) in enumerate(zip(points, map(str.lower, points), strict=True)) if c != low]
        engine.set_tables(bytes(word), lower)
    return engine


def _fmix64(h: int) -> int:
    h = ((h ^ h >> 33) * 0xFF51AFD7ED558CCD) & _MASK
    h = ((h ^ h >> 33) * 0xC4CEB9FE1A85EC53) & _MASK
    return h ^ h >> 33


def _token_hash(word: str) -> int:
    data = word.encode("utf-8", "surrogatepass")
    h = len(data) * _BASE & _MASK
    for at in range(0, len(data), 8):
        h = ((h ^ int.from_bytes(data[at : at + 8], "little")) * 0xFF51AFD7ED558CCD) & _MASK
        h ^= h >> 32
    return h * 0xC4CEB9FE1A85EC53 & _MASK


def _fast_row(text: str, ngram: int, a: NDArray[np.uint64], b: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """Scheme `fast` without the C++ engine: the same numbers, slowly."""
    words = [_token_hash(word) for word in tokens(text)]
    row = np.full(len(a), EMPTY, np.uint32)
    n = min(ngram, len(words))
    for i in range(len(words) - n + 1 if words else 0):
        h = 0
        for word in words[i : i + n]:
            h = (h * _BASE + word) & _MASK
        low = np.uint64(_fmix64(h) & 0xFFFFFFFF)
        np.minimum(row, (a * low + b).astype(np.uint32), out=row)
    return row
