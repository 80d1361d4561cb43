"""NVIDIA apex's fused RMSNorm. It has no fused residual, and with a weight of another type than x it gives that type."""

from __future__ import annotations

import importlib

import torch

from .probe import Adapter, Found, Symbol, find

RMS_NORM = Symbol(
    "apex.normalization.fused_layer_norm", "fused_rms_norm_affine", ("input", "weight", "normalized_shape", "eps")
)
_HOW = "install NVIDIA apex from its repository with --cuda_ext (the package `apex` on the package index is another)"


def _find() -> Found:
    found = find("apex", (RMS_NORM,), how=_HOW)
    if found.missing is None:
        try:
            importlib.import_module("fused_layer_norm_cuda")  # without it the function exists and fails when called
        except ImportError as error:
            return Found({}, f"apex is installed without its extension fused_layer_norm_cuda ({error}): {_HOW}")
    return found


PACKAGE = Adapter(_find)


def unsupported(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None) -> str | None:
    """Why it cannot serve, None if it can."""
    if (missing := PACKAGE.missing()) is not None:
        return missing
    if x.device.type != "cuda":
        return f"apex is for cuda, the tensors are on {x.device.type}"
    if residual is not None:
        return "apex has no fused residual addition"
    if weight.dtype != x.dtype:
        return f"apex would give {weight.dtype}, the weight's type"
    return None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """y like x."""
    y: torch.Tensor = PACKAGE["fused_rms_norm_affine"](x, weight, tuple(weight.shape), eps)
    return y
