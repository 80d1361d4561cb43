"""What the rows are held to: ratios within one run. The CPU's are from issue and design, the GPU's are goals on one H200."""

from __future__ import annotations

from typing import NamedTuple

from .cases import Case

REDUCED = 0.6
"""Forward rows of 128 MB tensors, whose new memory costs page faults, are held to this part of a goal."""


class Goal(NamedTuple):
    """A ratio that must be reached."""

    operator: str
    backward: bool | None
    """None: whatever the direction."""
    contender: str
    at_least: float
    """Speed of `row` over the contender's; with `share`, the part of the limit's rate."""
    row: str = "ours"
    shape: str = ""
    """Only for shapes that begin so."""
    peak: bool = False
    """Of peak bytes instead of times: the contender's over that of `row`."""


CPU: tuple[Goal, ...] = (
    Goal("add+rms_norm", False, "eager", 3.0),
    Goal("add+rms_norm", True, "eager", 4.0),
    Goal("add+rms_norm", False, "compile", 1.2),
    Goal("add+rms_norm", True, "compile", 1.5),
    Goal("swiglu", False, "eager", 1.9),
    Goal("swiglu", True, "eager", 2.5),
    Goal("swiglu", False, "compile", 1.0),
    Goal("swiglu", True, "compile", 1.1),
    Goal("rotary", False, "eager", 4.0),
    Goal("rotary", False, "compile", 0.95),
    Goal("rotary", False, "compile", 1.2, row="ours in place"),
    Goal("cross_entropy", True, "eager", 3.0, shape="512x8192"),
    Goal("cross_entropy", True, "compile", 2.5, shape="512x8192"),
    Goal("linear_cross_entropy", True, "eager", 1 / 1.05),
    Goal("linear_cross_entropy", True, "F.linear_cross_entropy", 1.0),
    Goal("linear_cross_entropy", True, "eager", 4.0, peak=True),
    Goal("packed attention", True, "dense mask", 2.5, shape="8 x 128 8/8x64"),
)

GPU: tuple[Goal, ...] = (
    Goal("rms_norm", False, "copy", 0.90),
    Goal("add+rms_norm", False, "copy", 0.90),
    Goal("rms_norm", True, "copy", 0.80),
    Goal("add+rms_norm", True, "copy", 0.80),
    Goal("add+rms_norm", False, "compile", 1.2),
    Goal("rotary", False, "copy", 0.85),
    Goal("swiglu", False, "copy", 0.90),
    Goal("swiglu", True, "copy", 0.90),
    Goal("cross_entropy", True, "copy", 0.80),
    Goal("cross_entropy", True, "liger", 2.0),
    Goal("cross_entropy", True, "compile", 1.8),
    Goal("linear_cross_entropy", True, "GEMM", 0.75),
    Goal("linear_cross_entropy", True, "liger", 2.0),
    Goal("linear_cross_entropy", True, "CCE unfiltered", 1.0),
    Goal("linear_cross_entropy", True, "F.linear_cross_entropy", 1.0),
    Goal("adamw + clip", False, "copy", 0.88),
    Goal("adamw + clip", False, "torch fused", 1.3),
    Goal("grad_norm", False, "copy", 0.85),
    Goal("grad_norm", False, "get_total_norm", 1.2),
    Goal("attention", False, "SDPA flash", 1.10, row="ours triton"),
    Goal("attention", True, "SDPA flash", 0.90, row="ours triton"),
    Goal("packed attention", True, "dense mask", 3.0, row="ours triton"),
    Goal("packed attention", True, "flash_attn", 0.95, row="ours triton"),
    Goal("packed attention", True, "flex", 1.0, row="ours triton"),
)


def goals_of(case: Case, device_type: str) -> list[Goal]:
    """Those a row is held to. Rows of 1 MB and less are reported only: they measure call overhead."""
    if device_type == "cpu" and case.size_bytes <= 1 << 20:
        return []
    found = []
    for goal in CPU if device_type == "cpu" else GPU:
        fits = goal.operator == case.operator and goal.backward in (None, case.backward)
        if fits and case.shape.startswith(goal.shape):
            large = device_type == "cpu" and case.size_bytes >= 1e8 and case.operator != "linear_cross_entropy"
            if large and case.backward:
                continue  # the issue sets goals for the forward rows of large tensors only
            found.append(goal._replace(at_least=goal.at_least * (REDUCED if large else 1.0)))
    return found
