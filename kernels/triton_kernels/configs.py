"""Launch settings by kernel and row width: data, so that nothing is tuned at run time.

Not measured on a GPU yet: the numbers follow from the register budget (a row of BLOCK values over 32·warps threads
should leave each thread at most 32 values) and are checked for spills on sm_80 and sm_90 by tools/check_triton.py. On
sm_100 the backward kernel still spills one register in two of 30 variants."""

from __future__ import annotations

from typing import NamedTuple


class Launch(NamedTuple):
    """Settings of one launch."""

    block: int
    """Row width rounded up to a power of two."""
    warps: int
    programs: int
    """Backward only: programs that share the rows; each keeps one partial dW."""


# (largest block, warps)
WARPS: tuple[tuple[int, int], ...] = ((512, 1), (1024, 2), (2048, 4), (4096, 8), (8192, 16), (32768, 32))
BACKWARD_PROGRAMS = 256


def launch(width: int, rows: int) -> Launch:
    """The settings for rows of `width` values."""
    block = 1 << max(width - 1, 0).bit_length()
    warps = next((w for limit, w in WARPS if block <= limit), 32)
    return Launch(block, warps, max(1, min(rows, BACKWARD_PROGRAMS)))
