"""Liger-Kernel's RMSNorm, with and without the residual. Its SwiGLU and cross entropy write gradients over their inputs,
which our functions promise to leave alone, so those are not offered; bench-kernels measures them directly."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from .probe import Adapter, Symbol, find

_TAIL = ("eps", "offset", "casting_mode", "in_place")
RMS_NORM = Symbol("liger_kernel.ops.rms_norm", "LigerRMSNormFunction", ("X", "W", *_TAIL))
ADD_RMS_NORM = Symbol("liger_kernel.ops.fused_add_rms_norm", "LigerFusedAddRMSNormFunction", ("X", "R", "W", *_TAIL))
PACKAGE = Adapter(partial(find, "liger_kernel", (RMS_NORM, ADD_RMS_NORM), how="pip install liger-kernel"))
MAX_WIDTH = 65536


def unsupported(x: torch.Tensor) -> str | None:
    """Why it cannot serve, None if it can."""
    if (missing := PACKAGE.missing()) is not None:
        return missing
    if x.device.type != "cuda":
        return f"Liger is for cuda, the tensors are on {x.device.type}"
    if x.dtype == torch.float64:
        return "Liger computes in fp32"
    if x.shape[-1] > MAX_WIDTH:
        return f"rows of {x.shape[-1]} values; Liger takes at most {MAX_WIDTH}"
    return None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None) -> Any:
    """y, or (y, x + residual). Everything in fp32 with one rounding ("gemma"), the upstream gradient left alone."""
    options = (eps, 0.0, "gemma", False)
    if residual is None:
        return PACKAGE["LigerRMSNormFunction"](x, weight, *options)
    return PACKAGE["LigerFusedAddRMSNormFunction"](x, residual, weight, *options)
