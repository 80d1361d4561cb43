"""The public function `rms_norm` and its registered operators: opencoder::rms_norm_fwd, add_rms_norm_fwd, rms_norm_bwd."""

from __future__ import annotations

from typing import Any

import torch

from . import _checks
from ._dispatch import choose, register
from ._library import Ops, TritonModule, call, define, like, register_both, statistics_type
from .adapters import apex, liger
from .reference.norm import rms_norm as _reference

_triton = TritonModule("rms_norm")


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
    _checks.at_least("rms_norm", 0, eps=eps)
    _checks.at_least("rms_norm", 1, M=x.shape[-1])
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"rms_norm: residual must be {x.dtype} {tuple(x.shape)} like x, "
            f"got {residual.dtype} {tuple(residual.shape)}"
        )
    chosen = choose("rms_norm", impl, x.device, x, weight, eps=eps, residual=residual)
    return chosen.run(x, weight, eps=eps, residual=residual)


def _registered(
    ops: Ops, x: torch.Tensor, weight: torch.Tensor, *, eps: float, residual: torch.Tensor | None = None
) -> Any:
    if residual is None:
        return call(ops, "rms_norm_fwd", x, weight, eps)[0]
    y, total, _ = call(ops, "add_rms_norm_fwd", x, residual, weight, eps)
    return y, total


register("rms_norm", "reference")(_reference)
register_both("rms_norm", _registered)


# ---- other packages ----


def _apex_supports(
    x: torch.Tensor, weight: torch.Tensor, *, residual: torch.Tensor | None = None, **options: Any
) -> str | None:
    return apex.unsupported(x, weight, residual)


@register("rms_norm", "apex", _apex_supports, missing=apex.PACKAGE.missing)
def _apex(x: torch.Tensor, weight: torch.Tensor, *, eps: float, residual: None = None) -> Any:
    return apex.rms_norm(x, weight, eps)


def _liger_supports(x: torch.Tensor, weight: torch.Tensor, **options: Any) -> str | None:
    return liger.unsupported(x)


@register("rms_norm", "liger", _liger_supports, missing=liger.PACKAGE.missing)
def _liger(x: torch.Tensor, weight: torch.Tensor, *, eps: float, residual: torch.Tensor | None = None) -> Any:
    return liger.rms_norm(x, weight, eps, residual)


# ---- the operators ----


def _statistics_like(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[:-1], dtype=statistics_type(x))


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, output[1])


def _backward(ops: Ops, ctx: Any, dy: torch.Tensor, drstd: Any) -> Any:
    x, weight, rstd = ctx.saved_tensors
    dx, dw = ops.rms_norm_bwd(dy, None, x, weight, rstd)
    return dx, dw.to(weight.dtype), None


def _save_sum(ctx: Any, inputs: Any, output: Any) -> None:
    _, total, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(total, inputs[2], rstd)


def _backward_sum(ops: Ops, ctx: Any, dy: torch.Tensor, dtotal: torch.Tensor, drstd: Any) -> Any:
    total, weight, rstd = ctx.saved_tensors
    dx, dw = ops.rms_norm_bwd(dy, dtotal, total, weight, rstd)
    return dx, dx, dw.to(weight.dtype), None


define(
    "rms_norm_fwd(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor rstd)",
    fake=lambda x, weight, eps: (like(x), _statistics_like(x)),
    triton=(lambda x, weight, eps: _triton.forward(x, None, weight, eps)[::2]),
    setup=_save,
    backward=_backward,
)
define(
    "add_rms_norm_fwd(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor y, Tensor total, Tensor rstd)",
    fake=lambda x, residual, weight, eps: (like(x), like(x), _statistics_like(x)),
    triton=_triton.forward,
    setup=_save_sum,
    backward=_backward_sum,
)
define(
    "rms_norm_bwd(Tensor dy, Tensor? dtotal, Tensor x, Tensor weight, Tensor rstd) -> (Tensor dx, Tensor dweight)",
    fake=lambda dy, dtotal, x, weight, rstd: (like(x), weight.new_empty(weight.shape, dtype=rstd.dtype)),
    triton=_triton.backward,
    refuse_backward=True,
)
