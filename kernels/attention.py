"""The public functions `attention` and `attention_backward`: dense or packed documents. The reference and torch's own
kernel (SDPA) share one loop over documents; the C++ and Triton kernels take the bounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from . import _checks
from ._dispatch import choose, kinds, register
from ._library import Ops, TritonModule, call, define, like, register_both, statistics_type, triton_supports
from .adapters import flash_attn
from .reference.attention import Window, attention_backward_dense, attention_dense

_triton = TritonModule("attention")
TRITON_HEAD_DIMS = 16, 256
"""What the Triton kernels take, in steps of 8."""


class _Case(NamedTuple):
    """Everything but the tensors, resolved."""

    causal: bool
    bounds_q: torch.Tensor | None
    bounds_k: torch.Tensor | None
    window: Window
    softcap: float | None
    scale: float
    return_lse: bool
    max_seqlen: int | None
    """Longest document in queries or keys, None if it was not said."""

    @property
    def plain(self) -> tuple[Any, ...]:
        """The arguments of the registered operators after the tensors: −1 is an unbounded window, 0 no softcap."""
        left, right = (-1 if side is None else side for side in self.window)
        longest = 0 if self.bounds_q is None else self.longest()
        return self.bounds_q, self.bounds_k, longest, self.causal, left, right, self.softcap or 0.0, self.scale

    def longest(self) -> int:
        """`max_seqlen`; read from the bounds if it was not given, for which a GPU has to be waited for."""
        if self.max_seqlen is not None:
            return self.max_seqlen
        assert self.bounds_q is not None
        assert self.bounds_k is not None
        return max((int(b.diff().max()) for b in (self.bounds_q, self.bounds_k) if b.numel() > 1), default=0)

    @property
    def dense(self) -> dict[str, Any]:
        """The arguments of the dense reference."""
        return {"causal": self.causal, "window": self.window, "softcap": self.softcap, "scale": self.scale}


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = True,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    window: int | tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Any:
    """softmax(scale · q kᵀ) v with H query heads over G key/value heads (G divides H).

    q (B,S,H,D), k, v (B,Sk,G,D); or packed: q (T,H,D), k, v (Tk,G,D) with document bounds `cu_seqlens` int32 (documents
    + 1,), `cu_seqlens_k` for the keys (default: the same), `max_seqlen` the longest document as an int. Causal is
    aligned bottom-right. `window` = left, or (left, right), inclusive; None is unbounded. `scale` defaults to D^−½.
    A row that sees no key gives 0 and lse −inf. Returns out, or (out, lse) with lse (B,H,S), packed (H,T), in fp32 or
    wider. Source: arXiv:1706.03762, arXiv:2305.13245."""
    case = _resolve(
        "attention", q, k, v, causal, cu_seqlens, cu_seqlens_k, max_seqlen, window, softcap, scale, return_lse
    )
    return choose("attention", impl, q.device, q, k, v, case=case).run(q, k, v, case=case)


def attention_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    causal: bool = True,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    window: int | tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv from the output and log-sum-exp of `attention`; shapes as there.

    `out` and `lse` may belong to a larger set of keys than `k` (ring attention): the gradients are then that set's."""
    options = (causal, cu_seqlens, cu_seqlens_k, max_seqlen, window, softcap, scale, True)
    case = _resolve("attention_backward", q, k, v, *options)
    statistics = (*q.shape[:-3], q.shape[-2], q.shape[-3])  # (B, H, S), packed (H, T)
    wide = statistics_type(q)
    for name, t, shape, kind in (
        ("dout", dout, q.shape, q.dtype), ("out", out, q.shape, q.dtype), ("lse", lse, statistics, wide),
    ):  # fmt: skip
        if t.shape != shape or t.dtype != kind:
            raise ValueError(
                f"attention_backward: {name} must be {kind} {tuple(shape)}, got {t.dtype} {tuple(t.shape)}"
            )
    _checks.one_device("attention_backward", q=q, dout=dout, out=out, lse=lse)
    with torch.no_grad():
        chosen = choose("attention_backward", impl, q.device, dout, q, k, v, out, lse, case=case)
        grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = chosen.run(dout, q, k, v, out, lse, case=case)
    return grads


@register("attention_backward", "reference")
def _reference_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    case: _Case,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if case.bounds_q is None:
        return attention_backward_dense(dout, q, k, v, out, lse, **case.dense)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows, keys in _documents(case):
        parts = (dout[rows], q[rows], k[keys], v[keys], out[rows], lse[:, rows])
        grads = attention_backward_dense(*(t[None] for t in parts), **case.dense)
        dq[rows], dk[keys], dv[keys] = (g[0] for g in grads)
    return dq, dk, dv


def _resolve(
    operator: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    cu_seqlens: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen: int | None,
    window: Any,
    softcap: float | None,
    scale: float | None,
    return_lse: bool,
) -> _Case:
    """Check the arguments and fill in defaults."""
    _checks.floating(operator, q=q, k=k, v=v)
    _checks.same_dtype(operator, q=q, k=k, v=v)
    rank = 4 if cu_seqlens is None else 3
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != rank or k.dim() != rank or k.shape != v.shape or q.shape[-1] != k.shape[-1]:
        form = "(B,S,H,D), (B,Sk,G,D)" if rank == 4 else "(T,H,D), (Tk,G,D) with cu_seqlens"
        raise ValueError(f"{operator}: shapes must be {form}, with k and v alike; got {shapes}")
    if rank == 4 and q.shape[0] != k.shape[0]:
        raise ValueError(f"{operator}: q and k have different batch sizes; got {shapes}")
    if q.shape[-1] == 0:
        raise ValueError(f"{operator}: head_dim is 0; it must be at least 1; got {shapes}")
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(f"{operator}: {q.shape[-2]} query heads must be a multiple of {k.shape[-2]} key heads")
    if cu_seqlens_k is not None and cu_seqlens is None:
        raise ValueError(f"{operator}: cu_seqlens_k is given without cu_seqlens")
    bounds_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    if cu_seqlens is not None and bounds_k is not None:
        _checks.one_device(operator, q=q, cu_seqlens=cu_seqlens, cu_seqlens_k=bounds_k)
        _checks.cu_seqlens(operator, "cu_seqlens", cu_seqlens, q.shape[0], max_seqlen)
        _checks.cu_seqlens(operator, "cu_seqlens_k", bounds_k, k.shape[0])
        if cu_seqlens.shape != bounds_k.shape:
            raise ValueError(f"{operator}: cu_seqlens and cu_seqlens_k name different numbers of documents")
    if isinstance(window, tuple) and len(window) != 2:
        raise ValueError(f"{operator}: window={window}; it must be a number (left) or a pair (left, right)")
    left, right = window if isinstance(window, tuple) else (window, None)
    for side, size in (("left", left), ("right", right)):
        if size is not None and (not isinstance(size, int) or size < 0):
            raise ValueError(f"{operator}: window {side}={size}; allowed: an integer from 0 on, None for unbounded")
    _checks.positive_cap(operator, softcap)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not math.isfinite(scale):
        raise ValueError(f"{operator}: scale={scale}; it must be finite")
    return _Case(causal, cu_seqlens, bounds_k, (left, right), softcap, scale, return_lse, max_seqlen)


def _case_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, case: _Case | None, options: dict[str, Any]) -> _Case:
    """The case of a call; from K.explain it comes as the public arguments."""
    if case is not None:
        return case
    defaults: dict[str, Any] = {"causal": True, "cu_seqlens": None, "cu_seqlens_k": None}
    defaults |= {"max_seqlen": None, "window": None, "softcap": None, "scale": None, "return_lse": False}
    return _resolve("attention", q, k, v, **{**defaults, **{n: options[n] for n in defaults if n in options}})


@kinds("attention")
def _kind(*tensors: torch.Tensor, case: _Case | None = None, **options: Any) -> str:
    packed = options.get("cu_seqlens") is not None if case is None else case.bounds_q is not None
    return "packed" if packed else ""


def _documents(case: _Case) -> list[tuple[slice, slice]]:
    """(query rows, key rows) of each document. Reads the bounds: on a GPU this waits for them."""
    assert case.bounds_q is not None
    assert case.bounds_k is not None
    q, k = case.bounds_q.tolist(), case.bounds_k.tolist()
    return [(slice(*a), slice(*b)) for a, b in zip(pairwise(q), pairwise(k), strict=True)]


def _packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, case: _Case, one: Callable[..., Any]) -> Any:
    """Run `one` on each document and put the results back in their rows."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    outs, lses = [q[:0]], [q.new_empty(q.shape[1], 0, dtype=wide)]
    for rows, keys in _documents(case):
        out, lse = one(q[None, rows], k[None, keys], v[None, keys], case)
        outs.append(out[0])
        if lse is not None:
            lses.append(lse[0])
    return (torch.cat(outs), torch.cat(lses, 1)) if case.return_lse else torch.cat(outs)


@register("attention", "reference")
def _run_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, case: _Case) -> Any:
    def one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, case: _Case) -> Any:
        return attention_dense(q, k, v, **case.dense)

    if case.bounds_q is not None:
        return _packed(q, k, v, case, one)
    out, lse = one(q, k, v, case)
    return (out, lse) if case.return_lse else out


def _torch_supports(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, case: _Case | None = None, **kw: Any
) -> str | None:
    case = _case_of(q, k, v, case, kw)
    if case.window != (None, None):
        return "SDPA has no sliding window"
    if case.softcap is not None:
        return "SDPA has no softcap"
    if case.return_lse:
        return "SDPA does not return the log-sum-exp"
    if case.causal and (q.shape[-3] != k.shape[-3] or case.bounds_q is not case.bounds_k):
        return "SDPA aligns the causal mask top-left; it is the same only for as many queries as keys"
    return None


@register("attention", "torch", _torch_supports)
def _run_torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, case: _Case) -> Any:
    """SDPA; for packed documents, once per document (2.5–4 times faster on a CPU than one dense mask)."""

    def one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, case: _Case) -> Any:
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=case.causal,
            scale=case.scale,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return out.transpose(1, 2), None

    return one(q, k, v, case)[0] if case.bounds_q is None else _packed(q, k, v, case, one)


# ---- other packages ----


def _flash_attn_supports(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, case: _Case | None = None, **kw: Any
) -> str | None:
    return flash_attn.unsupported(q, k, v, return_lse=_case_of(q, k, v, case, kw).return_lse)


@register("attention", "flash_attn", _flash_attn_supports, missing=flash_attn.PACKAGE.missing)
def _run_flash_attn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, case: _Case) -> Any:
    longest = 0 if case.bounds_q is None else case.longest()
    bounds = case.bounds_q, case.bounds_k, longest
    return flash_attn.attention(q, k, v, *bounds, return_lse=case.return_lse, **case.dense)


# ---- C++ and Triton ----


def _registered(ops: Ops, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, case: _Case) -> Any:
    out, lse = call(ops, "attention_fwd", q, k, v, *case.plain)
    return (out, lse) if case.return_lse else out


def _registered_backward(ops: Ops, *tensors: torch.Tensor, case: _Case) -> Any:
    return ops.attention_bwd(*tensors, None, *case.plain)


def _triton_head_fits(first: torch.Tensor, *rest: Any, **options: Any) -> str | None:
    reason = triton_supports(first)
    least, most = TRITON_HEAD_DIMS
    if reason is None and (not least <= first.shape[-1] <= most or first.shape[-1] % 8):
        reason = f"head_dim={first.shape[-1]}; the kernel takes multiples of 8 from {least} to {most}"
    return reason


register_both("attention", _registered, triton=_triton_head_fits)
register_both("attention_backward", _registered_backward, triton=_triton_head_fits)

_OPTIONS = "Tensor? cu_seqlens, Tensor? cu_seqlens_k, int max_seqlen, bool causal, int left, int right, float softcap, float scale"


def _lse_like(q: torch.Tensor, packed: bool) -> torch.Tensor:
    shape = (q.shape[1], q.shape[0]) if packed else (q.shape[0], q.shape[2], q.shape[1])
    return q.new_empty(shape, dtype=statistics_type(q))


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output)


def _backward(ops: Ops, ctx: Any, dout: torch.Tensor, dlse: torch.Tensor | None) -> Any:
    return *ops.attention_bwd(dout, *ctx.saved_tensors, dlse, *ctx.options), *(None for _ in ctx.options)


define(
    f"attention_fwd(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor out, Tensor lse)",
    fake=lambda q, k, v, bounds, *rest: (like(q), _lse_like(q, bounds is not None)),
    triton=_triton.forward,
    setup=_save,
    backward=_backward,
)
define(
    "attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? dlse, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    fake=lambda dout, q, k, v, *rest: (like(q), like(k), like(v)),
    triton=_triton.backward,
    refuse_backward=True,
)
