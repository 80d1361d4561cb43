"""FlashAttention 2 (Dao-AILab/flash-attention): (B,S,H,D) and packed (T,H,D) layouts are its own.

What differs: an unbounded window is −1, no softcap is 0.0, a row without keys has the log-sum-exp +inf, and the
log-sum-exp has no gradient. Its backward is private and changes between versions: attention_backward is not offered."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from .probe import Adapter, Symbol, find

_MODULE = "flash_attn.flash_attn_interface"
_OPTIONS = ("softmax_scale", "causal", "window_size", "softcap", "return_attn_probs")
DENSE = Symbol(_MODULE, "flash_attn_func", ("q", "k", "v"), _OPTIONS)
PACKED = Symbol(
    _MODULE,
    "flash_attn_varlen_func",
    ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"),
    _OPTIONS,
)
PACKAGE = Adapter(
    partial(find, "flash_attn", (DENSE, PACKED), how="pip install --no-build-isolation flash-attn (needs nvcc)")
)
MAX_HEAD_DIM = 256


def unsupported(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, return_lse: bool) -> str | None:
    """Why it cannot serve, None if it can."""
    if (missing := PACKAGE.missing()) is not None:
        return missing
    if q.device.type != "cuda":
        return f"flash-attn is for cuda, the tensors are on {q.device.type}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn takes fp16 and bf16, not {q.dtype}"
    if q.shape[-1] > MAX_HEAD_DIM or q.shape[-1] % 8:
        return f"head_dim={q.shape[-1]}; flash-attn takes multiples of 8 up to {MAX_HEAD_DIM}"
    if return_lse and torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        return "flash-attn gives no gradient of the log-sum-exp"
    return None


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bounds_q: torch.Tensor | None,
    bounds_k: torch.Tensor | None,
    longest: int,
    *,
    causal: bool,
    window: tuple[int | None, int | None],
    softcap: float | None,
    scale: float,
    return_lse: bool,
) -> Any:
    """out, or (out, lse), as our function gives them."""
    options: dict[str, Any] = {
        "softmax_scale": scale,
        "causal": causal,
        "window_size": tuple(-1 if side is None else side for side in window),
        "softcap": softcap or 0.0,
        "return_attn_probs": return_lse,
    }
    if bounds_q is None:
        found = PACKAGE["flash_attn_func"](q, k, v, **options)
    else:
        function = PACKAGE["flash_attn_varlen_func"]
        found = function(q, k, v, bounds_q, bounds_k, longest, longest, **options)
    if not return_lse:
        return found
    out, lse, _ = found
    return out, lse.masked_fill(lse == torch.inf, -torch.inf)
