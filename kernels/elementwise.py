"""The public functions `rotary` and `swiglu` and their registered operators."""

from __future__ import annotations

from typing import Any

import torch

from . import _checks
from ._dispatch import choose, register
from ._library import Ops, TritonModule, call, define, like, register_both
from .reference import elementwise as _reference

_triton = TritonModule("elementwise")


def rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    inplace: bool = False,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary position embedding of q (B,S,H,D) and k (B,S,G,D), half-split pairs, arithmetic in fp32 or wider.

    cos, sin: fp32 (S, R/2) or (B, S, R/2) with R ≤ D; dims from R on pass unchanged. For packed documents, give each
    token the angles of its position in its document. `inplace` overwrites contiguous q and k, and is for inference: an
    error where a gradient is wanted. Source: arXiv:2104.09864."""
    _checks.floating("rotary", q=q, k=k, cos=cos, sin=sin)
    _checks.same_dtype("rotary", q=q, k=k)
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"rotary: q and k must be (B,S,H,D) and (B,S,G,D), got {tuple(q.shape)} and {tuple(k.shape)}")
    b, s, _, d = q.shape
    allowed = [(s, cos.shape[-1]), (b, s, cos.shape[-1]), (1, s, cos.shape[-1])]
    if cos.shape != sin.shape or tuple(cos.shape) not in allowed or 2 * cos.shape[-1] > d:
        raise ValueError(
            f"rotary: cos and sin must be ({s}, R/2) or ({b}, {s}, R/2) with R ≤ {d}, got {tuple(cos.shape)} and "
            f"{tuple(sin.shape)}"
        )
    if inplace and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        raise ValueError("rotary: inplace=True where a gradient is wanted; call it under torch.no_grad(), or without")
    if inplace and not (q.is_contiguous() and k.is_contiguous()):
        raise ValueError("rotary: inplace=True needs contiguous q and k")
    chosen = choose("rotary", impl, q.device, q, k, cos, sin, inplace=inplace)
    turned: tuple[torch.Tensor, torch.Tensor] = chosen.run(q, k, cos, sin, inplace=inplace)
    return turned


def swiglu(gate: torch.Tensor, up: torch.Tensor, *, impl: str = "auto") -> torch.Tensor:
    """silu(gate) · up, both (…, F), in fp32 or wider with one rounding. Source: arXiv:2002.05202."""
    _checks.floating("swiglu", gate=gate, up=up)
    _checks.same_dtype("swiglu", gate=gate, up=up)
    if gate.shape != up.shape:
        raise ValueError(f"swiglu: gate {tuple(gate.shape)} and up {tuple(up.shape)} must have one shape")
    out: torch.Tensor = choose("swiglu", impl, gate.device, gate, up).run(gate, up)
    return out


def _rotary(
    ops: Ops, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, inplace: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos.float(), sin.float()
    if inplace:
        ops.rotary_(q, k, cos, sin, False)
        return q, k
    turned: tuple[torch.Tensor, torch.Tensor] = call(ops, "rotary", q, k, cos, sin, False)
    return turned


def _swiglu(ops: Ops, gate: torch.Tensor, up: torch.Tensor) -> Any:
    return call(ops, "swiglu_fwd", gate, up)


register("rotary", "reference")(_reference.rotary)
register_both("rotary", _rotary)
register("swiglu", "reference")(_reference.swiglu)
register_both("swiglu", _swiglu)


# ---- the operators ----


def _save_angles(ctx: Any, inputs: Any, output: Any) -> None:
    _, _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _rotary_backward(ops: Ops, ctx: Any, dq: torch.Tensor, dk: torch.Tensor) -> Any:
    cos, sin = ctx.saved_tensors
    return *ops.rotary(dq, dk, cos, sin, not ctx.inverse), None, None, None


def _save_inputs(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_backward(ops: Ops, ctx: Any, dout: torch.Tensor) -> Any:
    return ops.swiglu_bwd(dout, *ctx.saved_tensors)


define(
    "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool inverse) -> (Tensor, Tensor)",
    fake=lambda q, k, cos, sin, inverse: (like(q), like(k)),
    triton=_triton.rotary,
    setup=_save_angles,
    backward=_rotary_backward,
)
define(
    "rotary_(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin, bool inverse) -> ()",
    fake=lambda q, k, cos, sin, inverse: None,
    triton=_triton.rotary_,
)
define(
    "swiglu_fwd(Tensor gate, Tensor up) -> Tensor",
    fake=lambda gate, up: like(gate),
    triton=_triton.swiglu_fwd,
    setup=_save_inputs,
    backward=_swiglu_backward,
)
define(
    "swiglu_bwd(Tensor dout, Tensor gate, Tensor up) -> (Tensor dgate, Tensor dup)",
    fake=lambda dout, gate, up: (like(gate), like(up)),
    triton=_triton.swiglu_bwd,
    refuse_backward=True,
)
