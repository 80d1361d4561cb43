"""Nearest rows and the choice of active ones, one step after the other."""

from __future__ import annotations

import torch

FAR = 2**31 - 1
"""Priority of a row that is nobody's neighbour."""
_GOLDEN, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def neighbour_priority(
    labels: torch.Tensor, offsets: torch.Tensor, ids: torch.Tensor, positions: torch.Tensor, rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scatter of the labels' edges: the minimum of their positions, and their number."""
    starts = offsets[labels].long()
    lengths = offsets[labels + 1].long() - starts
    before = lengths.cumsum(0) - lengths
    edges = torch.repeat_interleave(starts - before, lengths)
    edges += torch.arange(edges.numel(), device=edges.device)
    targets = ids[edges].long()
    priority = torch.full((rows,), FAR, dtype=torch.int32, device=ids.device)
    priority.scatter_reduce_(0, targets, positions[edges].int(), "amin")
    count = torch.zeros(rows, dtype=torch.int32, device=ids.device)
    return priority, count.index_add_(0, targets, torch.ones_like(targets, dtype=torch.int32))


def smallest_keys(priority: torch.Tensor, count: int, hard: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both choices by keys that no two rows share: (priority, row), then (random number, row)."""
    numbers = torch.arange(priority.numel(), device=priority.device)
    wanted = min(hard, int((priority != FAR).sum()))
    first = (priority.long() * 2**31 + numbers).topk(wanted, largest=False, sorted=False).indices
    keys = random_keys(numbers, seed) * 2**31 + numbers
    keys[first] = 2**63 - 1
    rest = keys.topk(count - wanted, largest=False, sorted=False).indices
    rows, order = torch.cat([first, rest]).sort()
    return rows, order < wanted


def random_keys(numbers: torch.Tensor, seed: int) -> torch.Tensor:
    """32 random bits for each (seed, int64 number), the same on every device: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    z = (numbers + 1) * _signed(_GOLDEN) + _signed(seed)
    z = (z ^ _shifted(z, 30)) * _signed(_MIX1)
    z = (z ^ _shifted(z, 27)) * _signed(_MIX2)
    return _shifted(z ^ _shifted(z, 31), 32)


def _signed(x: int) -> int:
    """A 64-bit number as torch, which has none without a sign, holds it."""
    return (x + 2**63) % 2**64 - 2**63


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """To the right, with zeros coming in."""
    return (x >> bits) & (2 ** (64 - bits) - 1)
