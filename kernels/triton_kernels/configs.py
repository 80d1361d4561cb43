"""Launch settings by kernel, architecture, type and shape class: one table, read once a call, nothing tuned at run time.

Not measured on a GPU yet. The numbers follow from the register budget (a thread should hold at most 32 values of a row,
a tile's accumulators at most half its registers) and are checked for spills on each architecture by
tools/check_triton.py. tools/tune_kernels.py measures alternatives on a GPU and prints rows for this file."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple


class Launch(NamedTuple):
    """Settings of one launch."""

    block: int
    """Values of a program at a time; in attention: queries."""
    warps: int
    stages: int = 3
    """Depth of the software pipeline of the main loop."""
    block_n: int = 0
    """Attention: keys."""
    programs: int = 0
    """RMSNorm backward: programs that share the rows, each with one partial dW."""
    chunk: int = 0
    """Optimizer: values of one tensor that a program takes."""


Rows = tuple[tuple[float, Launch], ...]
"""(largest shape class, its settings), rising; the last takes everything."""
ANY = float("inf")

# (kernel, oldest architecture, bytes of a value at most) -> rows. The shape class is, for
# rms_norm: the row's width rounded up to a power of two; beyond the last row the kernel that loops over columns runs,
# attention: the head dim; the rest have one class.
TABLE: dict[tuple[str, int, int], Rows] = {
    ("rms_norm forward", 80, 8): (
        (512, Launch(512, 1)),
        (1024, Launch(1024, 2)),
        (2048, Launch(2048, 4)),
        (4096, Launch(4096, 8)),
        (8192, Launch(8192, 16)),
        (32768, Launch(32768, 32)),
    ),
    # About 2,100 warps in all: enough loads in flight for 108 to 148 processors, few enough partial sums.
    ("rms_norm backward", 80, 8): (
        (512, Launch(512, 1, programs=2112)),
        (1024, Launch(1024, 2, programs=1056)),
        (2048, Launch(2048, 4, programs=528)),
        (4096, Launch(4096, 8, programs=264)),
        (8192, Launch(8192, 16, programs=132)),
        (16384, Launch(16384, 32, programs=132)),
    ),
    ("rms_norm backward", 100, 8): (
        (512, Launch(512, 2, programs=1056)),
        (1024, Launch(1024, 4, programs=528)),
        (2048, Launch(2048, 8, programs=264)),
        (4096, Launch(4096, 16, programs=132)),
        (8192, Launch(8192, 32, programs=132)),
    ),
    ("rms_norm wide", 80, 8): ((ANY, Launch(4096, 16, programs=132)),),
    ("swiglu forward", 80, 8): ((ANY, Launch(2048, 8)),),
    ("swiglu backward", 80, 8): ((ANY, Launch(2048, 8)),),
    ("rotary", 80, 8): ((ANY, Launch(0, 4)),),
    ("cross_entropy", 80, 8): (
        (1024, Launch(1024, 4)),
        (ANY, Launch(4096, 8)),
    ),
    ("adamw", 80, 8): ((ANY, Launch(1024, 8, chunk=32768)),),
    ("squares", 80, 8): ((ANY, Launch(1024, 8, chunk=32768)),),
    # ---- attention ----
    ("attention forward", 80, 2): (
        (64, Launch(128, 8, 3, block_n=64)),
        (128, Launch(128, 8, 2, block_n=32)),
        (160, Launch(64, 4, 2, block_n=16)),
        (192, Launch(32, 4, 1, block_n=32)),
        (256, Launch(64, 8, 2, block_n=32)),
    ),
    ("attention dq", 80, 2): (
        (64, Launch(128, 8, 2, block_n=64)),
        (128, Launch(64, 4, 2, block_n=32)),
        (160, Launch(64, 4, 1, block_n=32)),
        (192, Launch(32, 4, 1, block_n=32)),
        (256, Launch(32, 4, 1, block_n=32)),
    ),
    ("attention dkdv", 80, 2): (
        (64, Launch(32, 8, 2, block_n=128)),
        (128, Launch(32, 8, 2, block_n=64)),
        (160, Launch(16, 8, 2, block_n=64)),
        (192, Launch(64, 8, 1, block_n=32)),
        (256, Launch(64, 8, 1, block_n=32)),
    ),
    ("attention forward", 90, 2): (
        (64, Launch(128, 8, 3, block_n=64)),
        (128, Launch(128, 8, 2, block_n=64)),
        (160, Launch(128, 8, 2, block_n=64)),
        (192, Launch(128, 8, 2, block_n=32)),
        (256, Launch(64, 8, 2, block_n=32)),
    ),
    ("attention dq", 90, 2): (
        (64, Launch(128, 8, 2, block_n=64)),
        (128, Launch(64, 4, 2, block_n=32)),
        (192, Launch(64, 4, 1, block_n=32)),
        (256, Launch(32, 4, 1, block_n=32)),
    ),
    ("attention dkdv", 90, 2): (
        (64, Launch(32, 8, 2, block_n=128)),
        (128, Launch(32, 8, 2, block_n=64)),
        (192, Launch(32, 8, 1, block_n=64)),
        (256, Launch(64, 8, 1, block_n=32)),
    ),
    ("attention forward", 100, 2): (
        (64, Launch(128, 8, 2, block_n=32)),
        (128, Launch(128, 8, 2, block_n=64)),
        (192, Launch(128, 8, 2, block_n=32)),
        (256, Launch(64, 8, 2, block_n=32)),
    ),
    ("attention dq", 100, 2): (
        (64, Launch(128, 8, 2, block_n=64)),
        (192, Launch(64, 4, 1, block_n=32)),
        (256, Launch(32, 4, 1, block_n=32)),
    ),
    # fp32 and fp64: for tests and small models. Beyond head dim 128 they spill, and are right but slow.
    ("attention forward", 80, 8): (
        (64, Launch(32, 4, 1, block_n=32)),
        (ANY, Launch(16, 8, 1, block_n=32)),
    ),
    ("attention dq", 80, 8): (
        (64, Launch(32, 4, 1, block_n=32)),
        (ANY, Launch(16, 8, 1, block_n=32)),
    ),
    ("attention dkdv", 80, 8): (
        (64, Launch(32, 4, 1, block_n=32)),
        (ANY, Launch(32, 8, 1, block_n=16)),
    ),
}


@cache
def settings(kernel: str, size: int, *, element_size: int, capability: int) -> Launch | None:
    """The row of the newest architecture not newer than `capability` (80 for sm_80) and the narrowest type that takes
    values of `element_size` bytes; None if `size` is beyond its last row."""
    fitting = [key for key in TABLE if key[0] == kernel and element_size <= key[2] and key[1] <= max(capability, 80)]
    narrowest = min(limit for _, _, limit in fitting)
    newest = max(arch for _, arch, limit in fitting if limit == narrowest)
    return next((launch for largest, launch in TABLE[kernel, newest, narrowest] if size <= largest), None)
