"""The public function `rms_norm`, its registration with torch, and the C++ and Triton implementations behind it.

The operators opencoder::rms_norm_fwd, add_rms_norm_fwd and rms_norm_bwd are defined once (_library.py), have a kernel
per device (CPU: csrc/ops/rms_norm.cpp; CUDA: Triton), a fake one for torch.compile, and an autograd formula."""

from __future__ import annotations

from typing import Any

import torch

from . import _checks
from ._dispatch import choose, register
from ._library import LIBRARY, cpp_missing
from .reference.norm import rms_norm as _reference

register("rms_norm", "reference")(_reference)

_CPP_MISSING = cpp_missing()
"""Why the C++ operators cannot run, None if they can. Settled at import, so that torch.compile sees a constant."""


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float,
    residual: torch.Tensor | None = None,
    impl: str = "auto",
) -> Any:
    """y = t · rsqrt(mean(t²) + eps) · weight over the last dim, t = x + residual; arithmetic in fp32 or wider.

    x, residual (…, M) of one type, weight (M,) of any floating type. Returns y, or (y, x + residual) if a residual is
    given; the norm is taken of the sum before it is rounded. Source: arXiv:1910.07467."""
    tensors = {"x": x, "weight": weight} | ({} if residual is None else {"residual": residual})
    _checks.floating("rms_norm", **tensors)
    if x.dim() < 1 or weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight must be ({x.shape[-1] if x.dim() else 'M'},), got {tuple(weight.shape)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"rms_norm: residual must be {x.dtype} {tuple(x.shape)} like x, "
            f"got {residual.dtype} {tuple(residual.shape)}"
        )
    chosen = choose("rms_norm", impl, x.device.type, x, weight, eps=eps, residual=residual)
    return chosen.run(x, weight, eps=eps, residual=residual)


def _registered(x: torch.Tensor, weight: torch.Tensor, *, eps: float, residual: torch.Tensor | None = None) -> Any:
    if residual is None:
        return torch.ops.opencoder.rms_norm_fwd(x, weight, eps)[0]
    y, total, _ = torch.ops.opencoder.add_rms_norm_fwd(x, residual, weight, eps)
    return y, total


def _cpp_supports(x: torch.Tensor, weight: torch.Tensor, **options: Any) -> str | None:
    if x.device.type != "cpu":
        return f"x is on {x.device.type}; the C++ operators are for cpu"
    return _CPP_MISSING


register("rms_norm", "cpp", _cpp_supports, missing=_CPP_MISSING)(_registered)


# ---- torch: fake kernels and autograd ----


def _statistics_like(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


@torch.library.register_fake("opencoder::rms_norm_fwd", lib=LIBRARY)
def _(x: torch.Tensor, weight: torch.Tensor, eps: float) -> Any:
    return torch.empty_like(x, memory_format=torch.contiguous_format), _statistics_like(x)


@torch.library.register_fake("opencoder::add_rms_norm_fwd", lib=LIBRARY)
def _(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> Any:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, torch.empty_like(y), _statistics_like(x)


@torch.library.register_fake("opencoder::rms_norm_bwd", lib=LIBRARY)
def _(dy: torch.Tensor, dtotal: Any, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor) -> Any:
    return torch.empty_like(x, memory_format=torch.contiguous_format), weight.new_empty(weight.shape, dtype=rstd.dtype)


def _no_double_backward(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError("rms_norm: double backward is not offered; use impl='reference', which is plain torch")


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])


def _save_sum(ctx: Any, inputs: Any, output: Any) -> None:
    _, total, rstd = output
    ctx.save_for_backward(total, inputs[2], rstd)


def _backward(ctx: Any, dy: torch.Tensor, drstd: Any) -> Any:
    x, weight, rstd = ctx.saved_tensors
    dx, dw = torch.ops.opencoder.rms_norm_bwd(dy, None, x, weight, rstd)
    return dx, dw.to(weight.dtype), None


def _backward_sum(ctx: Any, dy: torch.Tensor, dtotal: torch.Tensor, drstd: Any) -> Any:
    total, weight, rstd = ctx.saved_tensors
    dx, dw = torch.ops.opencoder.rms_norm_bwd(dy, dtotal, total, weight, rstd)
    return dx, dx, dw.to(weight.dtype), None


torch.library.register_autograd("opencoder::rms_norm_fwd", _backward, setup_context=_save, lib=LIBRARY)
torch.library.register_autograd("opencoder::add_rms_norm_fwd", _backward_sum, setup_context=_save_sum, lib=LIBRARY)
torch.library.register_autograd("opencoder::rms_norm_bwd", _no_double_backward, lib=LIBRARY)


# ---- Triton ----

try:
    from .triton_kernels import rms_norm as _triton
except ImportError:
    _triton = None  # type: ignore[assignment]
_TRITON_MISSING = "triton is not installed: pip install triton" if _triton is None else None


def _triton_supports(x: torch.Tensor, weight: torch.Tensor, **options: Any) -> str | None:
    if _triton is None:
        return _TRITON_MISSING
    if x.device.type != "cuda" and not _triton.INTERPRETED:
        return f"x is on {x.device.type}; Triton kernels are for cuda (or any device with TRITON_INTERPRET=1)"
    if x.dtype == torch.bfloat16 and _triton.INTERPRETED:
        return "Triton's interpreter computes bf16 wrongly; use fp32, fp16 or fp64"
    if x.shape[-1] > _triton.MAX_WIDTH:
        return f"rows of {x.shape[-1]} values; the kernel holds a row of at most {_triton.MAX_WIDTH}"
    return None


class _TritonRMSNorm(torch.autograd.Function):
    """For the interpreter, where the registered CPU kernel is the C++ one."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None) -> Any:
        y, total, rstd = _triton.forward(x, residual, weight, eps)
        ctx.save_for_backward(total, weight, rstd)
        ctx.with_residual = residual is not None
        if residual is None:
            return y
        return y, total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor, dtotal: torch.Tensor | None = None) -> Any:
        total, weight, rstd = ctx.saved_tensors
        dx, dw = _triton.backward(dy, dtotal, total, weight, rstd)
        return dx, dw.to(weight.dtype), None, dx if ctx.with_residual else None


@register("rms_norm", "triton", _triton_supports, missing=_TRITON_MISSING)
def _run_triton(x: torch.Tensor, weight: torch.Tensor, *, eps: float, residual: torch.Tensor | None = None) -> Any:
    if x.device.type == "cuda":
        return _registered(x, weight, eps=eps, residual=residual)
    return _TritonRMSNorm.apply(x, weight, eps, residual)


if _triton is not None:

    @torch.library.impl(LIBRARY, "rms_norm_fwd", "CUDA")
    def _(x: torch.Tensor, weight: torch.Tensor, eps: float) -> Any:
        y, _, rstd = _triton.forward(x, None, weight, eps)
        return y, rstd

    @torch.library.impl(LIBRARY, "add_rms_norm_fwd", "CUDA")
    def _(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> Any:
        return _triton.forward(x, residual, weight, eps)

    @torch.library.impl(LIBRARY, "rms_norm_bwd", "CUDA")
    def _(dy: torch.Tensor, dtotal: Any, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor) -> Any:
        return _triton.backward(dy, dtotal, x, weight, rstd)
