"""What the launchers share."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl

from .configs import Launch


class Variant(NamedTuple):
    """One kernel for one shape class, as tools/check_triton.py compiles it for a GPU that is not here."""

    name: str
    kernel: Any
    signature: dict[str, str]
    """Type of each argument that is not a constant: "*bf16", "fp32", "i32"…; "i32:16" is one known to divide by 16."""
    constants: dict[str, Any]
    warps: int
    stages: int = 3
    wide_loads: int = 0
    """128-bit loads the code must have at least: fewer mean that a contiguous row is read in small pieces."""
    tensor_cores: bool = False
    """The code must have Hopper's matrix instruction on sm_90."""


def wide_loads(values: int, size: int, warps: int) -> int:
    """128-bit loads with which 32·warps threads read `values` of `size` bytes; 0 if that is less than one each."""
    return values * size // 16 // (32 * warps)


def options(launch: Launch) -> dict[str, Any]:
    """What every launch passes to the compiler. FP fusion is named because its default changes in triton 3.10."""
    return {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}


def on_device(x: torch.Tensor) -> torch.cuda.device:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(x.device if x.device.type == "cuda" else -1)


def real_of(x: torch.Tensor) -> tuple[torch.dtype, tl.dtype]:
    """The arithmetic type for storage like `x`: torch's and Triton's name."""
    return (torch.float64, tl.float64) if x.dtype == torch.float64 else (torch.float32, tl.float32)


def capability(x: torch.Tensor) -> int:
    """80 for sm_80; the interpreter counts as 90."""
    if x.device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor
