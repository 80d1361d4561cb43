"""How a logit follows from a feature and a row: their product, or the scaled cosine between them with a margin for the target."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

SMALLEST_NORM = 1e-12
"""Rows and features shorter than this have no direction: their cosines are 0, and so are their gradients."""
SMALLEST_SINE_SQUARED = 1e-8
"""The sine is held above the root of this, where its slope would be infinite."""


class Margined(NamedTuple):
    """Cosines of targets as the loss sees them, and what a gradient must be multiplied by to be one of the true cosines."""

    cosines: torch.Tensor
    slopes: torch.Tensor


@dataclass(frozen=True)
class Variant:
    """z = x·w (plain), or scale·cos(x, w), of whose target cosine t arcface makes cos(arccos t + margin) (arXiv:1801.07698) and
    cosface t − margin (arXiv:1801.09414)."""

    name: Literal["plain", "cosine", "arcface", "cosface"] = "plain"
    scale: float = 30.0
    margin: float = 0.5

    @property
    def cosine(self) -> bool:
        """Whether rows and features are brought to length 1."""
        return self.name != "plain"

    @property
    def factor(self) -> float:
        """What products of rows and features are multiplied by."""
        return self.scale if self.cosine else 1.0

    @property
    def changes_targets(self) -> bool:
        """Whether the target's cosine is treated apart."""
        return self.name in ("arcface", "cosface") and self.margin > 0

    def margined(self, cosines: torch.Tensor) -> Margined:
        """Cosines of targets, any shape. Beyond π − margin, where cos(θ + margin) would rise again, arcface goes on with
        t − margin·sin(margin), as insightface does."""
        t = cosines.clamp(-1, 1)
        if self.name == "cosface":
            return Margined(t - self.margin, torch.ones_like(t))
        cos_m, sin_m = math.cos(self.margin), math.sin(self.margin)
        sine_squared = 1 - t * t
        sine = sine_squared.clamp(min=SMALLEST_SINE_SQUARED).sqrt()
        before = t > -cos_m  # θ + margin < π
        flat = sine_squared < SMALLEST_SINE_SQUARED
        slopes = cos_m + torch.where(flat, 0, t / sine * sin_m)
        return Margined(
            torch.where(before, t * cos_m - sine * sin_m, t - self.margin * sin_m),
            torch.where(before, slopes, 1),
        )


def directions(x: torch.Tensor) -> torch.Tensor:
    """(n, D) → rows of length 1, in the type of `x`, differentiable; zero ones stay zero."""
    norm = x.norm(dim=-1, keepdim=True)
    return x / torch.where(norm > SMALLEST_NORM, norm, torch.inf)
