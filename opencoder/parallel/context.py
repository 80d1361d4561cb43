"""Context parallelism: every sample is cut over the ranks of cp, which see one another in attention alone.

A sample of S tokens is 2·cp chunks; rank r holds chunks r and 2·cp − 1 − r, one early and one late ("zigzag"), so that causal
attention is the same work for all. Labels are those of the whole sample, cut in the same way: at a seam no neighbour has to be
asked for the next token.

B samples, S tokens of a sample, S/cp of them here."""

from __future__ import annotations

import torch

from .group import Group


def chunks_of(rank: int, size: int) -> tuple[int, int]:
    """Numbers of the two chunks of a rank, of 2·size."""
    return rank, 2 * size - 1 - rank


def split_sequence(x: torch.Tensor, cp: Group) -> torch.Tensor:
    """(B, S, …) of whole samples → this rank's (B, S/cp, …). Raises ValueError if S is not a multiple of 2·cp."""
    if cp.size == 1:
        return x
    if x.shape[1] % (2 * cp.size):
        raise ValueError(
            f"samples of {x.shape[1]} tokens cannot be cut in 2·cp = {2 * cp.size} chunks: take a multiple"
        )
    chunks = x.chunk(2 * cp.size, 1)
    return torch.cat([chunks[i] for i in chunks_of(cp.rank, cp.size)], 1)


def token_numbers(length: int, cp: Group, *, device: torch.device | None = None) -> torch.Tensor:
    """(length,) int64: where in its sample each of this rank's `length` = S/cp tokens stands."""
    whole = torch.arange(length * cp.size, device=device)
    return split_sequence(whole[None], cp)[0]
