"""Contenders from torch and from other packages. Each is there only where it can run: a package that is not installed, or
a device it does not serve, takes its column away, and the table says which."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from opencoder import kernels as K

from . import eager

Functions = dict[str, Callable[..., Any]]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for the shape at hand."""
    return torch.compile(function, dynamic=False)


def has(package: str) -> bool:
    """Whether it can be imported."""
    return importlib.util.find_spec(package) is not None


def rms_norm(residual: bool, device: torch.device, dtype: torch.dtype, weight_type: torch.dtype) -> Functions:
    """Liger and apex through the adapters."""
    if device.type != "cuda":
        return {}
    found: Functions = {}
    x = torch.empty(2, 8, device=device, dtype=dtype)
    w, r = torch.empty(8, device=device, dtype=weight_type), x if residual else None
    for name in ("liger", "apex"):
        if f"{name}: can serve" in K.explain("rms_norm", x, w, eps=eager.EPS, residual=r):
            found[name] = lambda x, w, r=None, name=name: K.rms_norm(x, w, eps=eager.EPS, residual=r, impl=name)
    return found


def swiglu(device: torch.device) -> Functions:
    """Liger's writes gradients over its inputs: it is given copies, made outside of what is timed, by the harness."""
    if device.type != "cuda" or not has("liger_kernel"):
        return {}
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return {"liger": LigerSiLUMulFunction.apply}


def cross_entropy(targets: torch.Tensor, device: torch.device) -> Functions:
    """Liger's writes the gradient over the logits in its forward pass."""
    if device.type != "cuda" or not has("liger_kernel"):
        return {}
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    return {"liger": lambda x: LigerCrossEntropyFunction.apply(x, targets, None)[0]}


def linear_cross_entropy(targets: torch.Tensor, device: torch.device) -> Functions:
    """torch's chunked function, Liger's, Apple's."""
    found: Functions = {}
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()
        found["F.linear_cross_entropy"] = partial(_functional_linear, targets=targets, options=options)
    if device.type == "cuda" and has("liger_kernel"):
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        found["liger"] = lambda x, w: LigerFusedLinearCrossEntropyFunction.apply(x, w, targets)[0]
    if device.type == "cuda" and has("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy as cce

        found["CCE"] = lambda x, w: cce(x, w, targets)
        found["CCE unfiltered"] = lambda x, w: cce(x, w, targets, filter_eps=None)
    return found


def _functional_linear(x: torch.Tensor, w: torch.Tensor, *, targets: torch.Tensor, options: Any) -> torch.Tensor:
    loss: torch.Tensor = F.linear_cross_entropy(x, w, targets, options=options)
    return loss


def packed_attention(bounds: torch.Tensor, longest: int, device: torch.device, dtype: torch.dtype) -> Functions:
    """FlexAttention and flash-attn."""
    if device.type != "cuda":
        return {}
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    at = torch.arange(int(bounds[-1]), device=device)
    document = torch.searchsorted(bounds.long(), at, right=True)

    def seen(b: Any, h: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (document[q] == document[k]) & (q >= k)

    mask = create_block_mask(seen, None, None, len(at), len(at), device=str(device))
    flex = torch.compile(flex_attention, dynamic=False)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        gqa = q.shape[1] != k.shape[1]
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        out: Any = flex(q, k, v, block_mask=mask, enable_gqa=gqa)
        return out[0].transpose(0, 1)

    found: Functions = {"flex": run}
    if (
        K.explain("attention", *(torch.empty(8, 2, 64, device=device, dtype=dtype),) * 3, cu_seqlens=bounds[:1]).find(
            "flash_attn: can serve"
        )
        >= 0
    ):
        found["flash_attn"] = partial(K.attention, cu_seqlens=bounds, max_seqlen=longest, impl="flash_attn")
    return found


def dense_attention(window: int | None, device: torch.device, dtype: torch.dtype) -> Functions:
    """SDPA by backend, FlexAttention, flash-attn."""
    if device.type != "cuda":
        return {"SDPA": partial(eager.dense_attention, window=window)}
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def on(backend: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return eager.dense_attention(q, k, v, window=window)

    if window is None:
        found: Functions = {
            "SDPA flash": partial(on, SDPBackend.FLASH_ATTENTION), "SDPA cuDNN": partial(on, SDPBackend.CUDNN_ATTENTION),
        }  # fmt: skip
    else:
        found = {"SDPA mask": partial(eager.dense_attention, window=window)}
    flex = torch.compile(flex_attention, dynamic=False)

    def seen(b: Any, h: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (q >= k) if window is None else (q >= k) & (q - k <= window)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        mask = _block_mask(create_block_mask, seen, q.shape[1], str(device), window)
        gqa = q.shape[2] != k.shape[2]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out: Any = flex(q, k, v, block_mask=mask, enable_gqa=gqa)
        return out.transpose(1, 2)

    found["flex"] = run
    probe = torch.empty(1, 8, 2, 64, device=device, dtype=dtype)
    if "flash_attn: can serve" in K.explain("attention", probe, probe, probe, window=window):
        found["flash_attn"] = partial(K.attention, window=window, impl="flash_attn")
    return found


_MASKS: dict[tuple[int, int | None], Any] = {}


def _block_mask(create: Any, seen: Any, length: int, device: str, window: int | None) -> Any:
    """Made once a shape, as a trainer would."""
    if (length, window) not in _MASKS:
        _MASKS[length, window] = create(seen, None, None, length, length, device=device)
    return _MASKS[length, window]


class AdamWState:
    """Parameters with gradients and state, for ours and for what one would write with torch."""

    clip = 0.5

    def __init__(self, sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        def make() -> list[torch.Tensor]:
            return [torch.randn(n, device=device, dtype=dtype) for n in sizes]

        self.narrow = dtype != torch.float32
        self.params, self.grads = make(), make()
        wide = [p.float() for p in self.params]
        self.masters = wide if self.narrow else None
        self.first, self.second = ([torch.zeros_like(p) for p in wide] for _ in range(2))
        self.clip_tensor = torch.tensor(self.clip, device=device)

    def ours(self) -> None:
        """Clip, update and copy to the parameters in one pass."""
        K.adamw_step(
            self.params, self.grads, self.first, self.second, self.masters, step=10, lr=1e-4, betas=(0.9, 0.95), eps=1e-8,
            weight_decay=0.1, clip_coef=self.clip_tensor,
        )  # fmt: skip

    def nothing(self) -> list[torch.Tensor]:
        """No truth: see tests/kernels/test_optimizer.py."""
        return []

    def peers(self) -> Functions:
        """torch's optimizers after a pass that clips, and with masters one that copies to the parameters."""
        leaves = [torch.nn.Parameter(p.float()) for p in self.params]
        grads = [g.float() for g in self.grads] if not self.narrow else None
        optimizers = {
            name: torch.optim.AdamW(leaves, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, **{name: True})
            for name in ("fused", "foreach")
        }

        def step(optimizer: torch.optim.Optimizer) -> None:
            ready = [g.float() for g in self.grads] if grads is None else grads
            torch._foreach_mul_(ready, self.clip_tensor)
            for leaf, g in zip(leaves, ready, strict=True):
                leaf.grad = g
            optimizer.step()
            if self.narrow:
                torch._foreach_copy_(self.params, [leaf.detach() for leaf in leaves])

        def only(optimizer: torch.optim.Optimizer) -> None:
            for leaf, g in zip(leaves, grads or [], strict=True):
                leaf.grad = g
            optimizer.step()

        found: Functions = {f"torch {name}": partial(step, optimizer) for name, optimizer in optimizers.items()}
        if grads is not None:
            found["torch fused, no clip"] = partial(only, optimizers["fused"])
        return found
