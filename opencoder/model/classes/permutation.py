"""Class ids in another order, so that related classes, which often have neighbouring ids, are spread over the ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from opencoder import kernels as K

ROUNDS = 6


@dataclass(frozen=True)
class Permutation:
    """A bijection of [0, classes) made from a seed, without a table: a Feistel network over pairs of numbers, walked on from
    what is outside the range (Black and Rogaway, CT-RSA 2002). What a checkpoint stores of it is the two numbers."""

    classes: int
    seed: int

    @property
    def _sides(self) -> tuple[int, int]:
        """Pairs (left < a, right < b) number a bit more than the classes: about √classes, so few walk on."""
        a = max(2, math.isqrt(max(1, self.classes - 1)) + 1)
        return a, max(2, -(-self.classes // a))

    def rows_of(self, labels: torch.Tensor) -> torch.Tensor:
        """Class ids (int64, any shape) → row ids. Numbers that are no class stay: ignored labels, and wrong ones, which the head tells
        all ranks of."""
        return self._walk(labels, self._forward)

    def labels_of(self, rows: torch.Tensor) -> torch.Tensor:
        """Row ids → class ids: the inverse of `rows_of`."""
        return self._walk(rows, self._backward)

    def _walk(self, numbers: torch.Tensor, turn: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        if numbers.dtype != torch.int64:
            raise ValueError(f"Permutation: numbers are {numbers.dtype}; allowed: int64")
        inside = (numbers >= 0) & (numbers < self.classes)
        found = turn(torch.where(inside, numbers, 0))
        while (outside := found >= self.classes).any():
            found[outside] = turn(found[outside])
        return torch.where(inside, found, numbers)

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self._sides
        left, right = x // b, x % b
        for i in range(0, ROUNDS, 2):
            left = (left + self._noise(right, i)) % a
            right = (right + self._noise(left, i + 1)) % b
        return left * b + right

    def _backward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self._sides
        left, right = x // b, x % b
        for i in reversed(range(0, ROUNDS, 2)):
            right = (right - self._noise(left, i + 1)) % b
            left = (left - self._noise(right, i)) % a
        return left * b + right

    def _noise(self, x: torch.Tensor, turn: int) -> torch.Tensor:
        return K.random_keys(x, self.seed * ROUNDS + turn)
