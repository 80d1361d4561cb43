"""Classes that come in groups of similar ones, of any number and without a table: all follows from the class id and the seed.

Our construction (sheet 8.3): a class is its group's direction with the sibling's own noise, a sample is its class with noise, so
that what confuses a classifier is known: the siblings. n ids, D width."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opencoder.errors import ConfigError

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]
_GROUP, _SIBLING, _SAMPLE, _LABEL = range(4)
_BLOCK = 1 << 16


def _bits(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser: 64 well mixed bits of each key."""
    x = keys * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _keys(ids: Ids, stream: int, seed: int) -> NDArray[np.uint64]:
    mixed = _bits(np.asarray([seed * 8 + stream + 1], np.uint64))
    return _bits(ids.astype(np.uint64) ^ mixed)


def normals(ids: Ids, width: int, *, stream: int, seed: int) -> Floats:
    """(n,) ids → (n, width) standard normal numbers, the same for an id wherever it stands (Box–Muller of hashed counters)."""
    half = (width + 1) // 2
    counters = np.arange(half, dtype=np.uint64)
    out = np.empty((len(ids), 2 * half), np.float32)
    for begin in range(0, len(ids), _BLOCK):
        bits = _bits(_keys(ids[begin : begin + _BLOCK], stream, seed)[:, None] + counters)
        radius = np.sqrt(
            -2 * np.log(((bits >> np.uint64(32)).astype(np.float32) + np.float32(0.5)) * np.float32(2**-32))
        )
        angle = (bits & np.uint64(0xFFFFFFFF)).astype(np.float32) * np.float32(2 * np.pi * 2**-32)
        out[begin : begin + _BLOCK, :half] = radius * np.cos(angle)
        out[begin : begin + _BLOCK, half:] = radius * np.sin(angle)
    return out[:, :width]


def _unit(x: Floats) -> Floats:
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x


@dataclass(frozen=True)
class Siblings:
    """`classes` in groups of `group`. `spread` and `noise`: length of a sibling's noise and of a sample's, beside a direction of
    length 1."""

    classes: int
    dim: int
    group: int = 20
    spread: float = 0.7
    noise: float = 0.5
    zipf: bool = False
    """Labels as frequent as 1/rank, ranks spread over the ids; otherwise all alike."""
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.classes, self.dim, self.group) < 1 or min(self.spread, self.noise) < 0:
            raise ConfigError(
                f"synthetic classes: classes={self.classes}, dim={self.dim}, group={self.group} must be at least 1, "
                f"spread={self.spread} and noise={self.noise} at least 0"
            )

    def centres(self, ids: Ids) -> Floats:
        """(n,) class ids → (n, D) unit rows."""
        groups = _unit(normals(ids // self.group, self.dim, stream=_GROUP, seed=self.seed))
        own = normals(ids, self.dim, stream=_SIBLING, seed=self.seed)
        return _unit(groups + own * np.float32(self.spread / self.dim**0.5))

    def labels(self, numbers: Ids) -> Ids:
        """(n,) numbers of samples → their classes."""
        uniform = (_keys(numbers, _LABEL, self.seed) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        if not self.zipf:
            return np.minimum((uniform * self.classes).astype(np.int64), self.classes - 1)
        rank = np.minimum(np.exp(uniform * np.log(self.classes + 1)).astype(np.int64), self.classes) - 1
        return rank * self._stride() % self.classes

    def _stride(self) -> int:
        """Coprime to the number of classes: ranks spread over all ids, each id once."""
        stride = max(1, int(self.classes * 0.618))
        while np.gcd(stride, self.classes) != 1:
            stride += 1
        return stride

    def samples(self, numbers: Ids) -> tuple[Floats, Ids]:
        """(n,) numbers → features (n, D) and labels (n,)."""
        labels = self.labels(numbers)
        own = normals(numbers, self.dim, stream=_SAMPLE, seed=self.seed)
        return self.centres(labels) + own * np.float32(self.noise / self.dim**0.5), labels
