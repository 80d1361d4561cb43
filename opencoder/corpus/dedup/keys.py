"""From texts to band keys: what locality-sensitive hashing needs to keep of a signature (256 bytes instead of 8 KB for 16
bands of 128 rows).

A key is the SHA-1 of the band's number and its slots as little-endian 32-bit numbers, cut to 64 bits (first pass) or 128
(full); a key of another band is another key. Zero means no key: a text without tokens, or a band that nobody asked for."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import minhash
from ..minhash import EMPTY, Texts
from .curve import FIRST_ROWS, Recipe

KEY = np.dtype([("a", "<u8"), ("b", "<u8")])
"""A band's full key."""

BATCH = 512
"""Documents whose signatures exist at one time without the C++ engine: 4 MB at 2048 slots."""


def first_keys(texts: Texts, recipe: Recipe) -> NDArray[np.uint64]:
    """(documents, bands) keys over the first FIRST_ROWS rows of each band: what all documents get.

    Two documents that agree in a whole band agree in its first rows; so one that shares no first key has no neighbour."""
    rows = min(FIRST_ROWS, recipe.rows)
    found = _keys(texts, recipe, rows, None, 1)
    return found.reshape(found.shape[:2])


def full_keys(texts: Texts, recipe: Recipe, wanted: NDArray[np.bool_] | None = None) -> NDArray[Any]:
    """(documents, bands) of KEY over all rows, for the bands `wanted` (documents, bands) alone, or for all."""
    found = _keys(texts, recipe, recipe.rows, wanted, 2)
    return found.view(KEY).reshape(found.shape[:2])


def band_keys(signatures: NDArray[Any], bands: int, rows: int) -> NDArray[Any]:
    """(documents, bands) of KEY from whole signatures (documents, ≥ bands·rows)."""
    if signatures.shape[1] < bands * rows:
        raise ValueError(f"{bands} bands of {rows} rows need {bands * rows} permutations, got {signatures.shape[1]}")
    return _hash_bands(signatures[:, : bands * rows], bands, rows, None, 2).view(KEY).reshape(-1, bands)


def _keys(
    texts: Texts, recipe: Recipe, use_rows: int, wanted: NDArray[np.bool_] | None, width: int
) -> NDArray[np.uint64]:
    """(documents, bands, width) keys over the first `use_rows` rows of each band."""
    minhash.check_arguments(recipe.bands * recipe.rows, recipe.scheme, recipe.ngram)
    all_permutations = minhash.permutations_of(recipe.bands * recipe.rows, recipe.scheme, recipe.seed)
    a, b = (p.reshape(recipe.bands, recipe.rows)[:, :use_rows].ravel() for p in all_permutations)
    engine = minhash._engine()
    if engine is not None:
        found: NDArray[np.uint64] = engine.minhash_keys(
            minhash.engine_texts(texts), a, b, recipe.ngram, recipe.scheme, recipe.bands, wanted, width
        )
        return found
    plain = minhash.strings(texts)
    parts = [np.zeros((0, recipe.bands, width), np.uint64)]
    for start in range(0, len(plain), BATCH):
        part = slice(start, start + BATCH)
        slots = minhash.plain_signatures(plain[part], a, b, recipe.ngram, recipe.scheme)
        parts.append(_hash_bands(slots, recipe.bands, use_rows, None if wanted is None else wanted[part], width))
    return np.concatenate(parts)


def _hash_bands(
    signatures: NDArray[Any], bands: int, rows: int, wanted: NDArray[np.bool_] | None, width: int
) -> NDArray[np.uint64]:
    """(documents, bands, width) keys of signatures (documents, bands·rows)."""
    keys = np.zeros((len(signatures), bands, width), np.uint64)
    slots = np.ascontiguousarray(signatures.astype("<u4")).reshape(len(signatures), bands, rows)
    for document in np.flatnonzero((slots != EMPTY).any(axis=(1, 2))):
        for band in range(bands) if wanted is None else np.flatnonzero(wanted[document]):
            message = int(band).to_bytes(4, "little") + slots[document, band].tobytes()
            keys[document, band] = np.frombuffer(hashlib.sha1(message).digest()[: 8 * width], "<u8")
            keys[document, band, 0] = keys[document, band, 0] or 1  # never zero, which means no key
    return keys
