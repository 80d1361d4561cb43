"""Rotary embedding and SwiGLU in Triton: each input is read once and each output written once.

Bytes moved, 16-bit: rotary 4·T·(H + G)·D + 4·S·D for the angles; SwiGLU forward 6·T·F, backward 10·T·F."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from .configs import Launch, settings
from .launching import Variant, capability, on_device, options, real_of, wide_loads


@triton.jit
def swiglu_forward_kernel(gate_ptr, up_ptr, out_ptr, size, BLOCK: tl.constexpr, REAL: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(REAL)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(REAL)
    tl.store(out_ptr + at, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(
    dout_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, size, BLOCK: tl.constexpr, REAL: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    dout = tl.load(dout_ptr + at, mask=inside, other=0.0).to(REAL)
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(REAL)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(REAL)
    s = tl.sigmoid(gate)
    dgate = dout * up * s * (1.0 + gate * (1.0 - s))
    tl.store(dgate_ptr + at, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)
    tl.store(dup_ptr + at, (dout * gate * s).to(dup_ptr.dtype.element_ty), mask=inside)


def _launch(kernel: str, x: torch.Tensor) -> Launch:
    found = settings(kernel, 0, element_size=x.element_size(), capability=capability(x))
    assert found is not None
    return found


def swiglu_fwd(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) · up, any shape."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    if out.numel():
        launch = _launch("swiglu forward", gate)
        with on_device(gate):
            swiglu_forward_kernel[(triton.cdiv(out.numel(), launch.block),)](
                gate, up, out, out.numel(), BLOCK=launch.block, REAL=real_of(gate)[1], **options(launch)
            )
    return out


def swiglu_bwd(dout: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """dgate, dup."""
    dout, gate, up = dout.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    if gate.numel():
        launch = _launch("swiglu backward", gate)
        with on_device(gate):
            swiglu_backward_kernel[(triton.cdiv(gate.numel(), launch.block),)](
                dout, gate, up, dgate, dup, gate.numel(), BLOCK=launch.block, REAL=real_of(gate)[1], **options(launch)
            )
    return dgate, dup


@triton.jit
def _turn(
    x_ptr, out_ptr, token, cos, sin,
    HEADS: tl.constexpr, BLOCK_HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    REST: tl.constexpr, BLOCK_REST: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """All heads of one token; dims from 2·HALF on are copied (REST of them, 0 in place)."""
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    base = (token * HEADS + head) * D
    inside = (head < HEADS) & (column < HALF)
    a = tl.load(x_ptr + base + column, mask=inside, other=0.0).to(REAL)
    b = tl.load(x_ptr + base + HALF + column, mask=inside, other=0.0).to(REAL)
    kind = out_ptr.dtype.element_ty
    tl.store(out_ptr + base + column, (a * cos[None, :] - b * sin[None, :]).to(kind), mask=inside)
    tl.store(out_ptr + base + HALF + column, (b * cos[None, :] + a * sin[None, :]).to(kind), mask=inside)
    if REST > 0:
        beyond = tl.arange(0, BLOCK_REST)[None, :]
        at = base + 2 * HALF + beyond
        copied = (head < HEADS) & (beyond < REST)
        tl.store(out_ptr + at, tl.load(x_ptr + at, mask=copied, other=0.0), mask=copied)


@triton.jit
def rotary_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, positions, direction,
    H: tl.constexpr, BLOCK_H: tl.constexpr, G: tl.constexpr, BLOCK_G: tl.constexpr, D: tl.constexpr,
    HALF: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, BLOCK_REST: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    at = (token % positions) * HALF + column
    cos = tl.load(cos_ptr + at, mask=column < HALF, other=0.0).to(REAL)
    sin = tl.load(sin_ptr + at, mask=column < HALF, other=0.0).to(REAL) * direction
    _turn(q_ptr, q_out_ptr, token, cos, sin, H, BLOCK_H, D, HALF, BLOCK, REST, BLOCK_REST, REAL)
    _turn(k_ptr, k_out_ptr, token, cos, sin, G, BLOCK_G, D, HALF, BLOCK, REST, BLOCK_REST, REAL)


def _rotary_constants(heads: int, kv_heads: int, d: int, half: int, *, copy_rest: bool) -> dict[str, Any]:
    rest = d - 2 * half if copy_rest else 0
    power = triton.next_power_of_2
    return {
        "H": heads, "BLOCK_H": power(heads), "G": kv_heads, "BLOCK_G": power(kv_heads), "D": d, "HALF": half,
        "BLOCK": power(max(half, 1)), "REST": rest, "BLOCK_REST": power(max(rest, 1)),
    }  # fmt: skip


def _launch_rotary(
    q: torch.Tensor, k: torch.Tensor, q_out: torch.Tensor, k_out: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
    inverse: bool,
) -> None:  # fmt: skip
    cos, sin = cos.contiguous(), sin.contiguous()
    half, tokens = cos.shape[-1], q.shape[0] * q.shape[1]
    # Angles repeat after S tokens, or are given for each of the B·S.
    positions = q.shape[1] if cos.dim() == 2 or cos.shape[0] == 1 else tokens
    if tokens and q.shape[2] and k.shape[2]:
        with on_device(q):
            rotary_kernel[(tokens,)](
                q, k, q_out, k_out, cos, sin, positions, -1.0 if inverse else 1.0,
                **_rotary_constants(q.shape[2], k.shape[2], q.shape[3], half, copy_rest=q_out is not q),
                REAL=real_of(q)[1], **options(_launch("rotary", q)),
            )  # fmt: skip


def rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """q (B,S,H,D) and k (B,S,G,D) turned; `inverse` turns back, which is the gradient."""
    q, k = q.contiguous(), k.contiguous()
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    _launch_rotary(q, k, q_out, k_out, cos, sin, inverse)
    return q_out, k_out


def rotary_(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, inverse: bool) -> None:
    """The same over q and k themselves, which are contiguous."""
    _launch_rotary(q, k, q, k, cos, sin, inverse)


def variants(arch: int) -> Iterator[Variant]:
    """What is compiled without a GPU."""
    for kind, size in (("bf16", 2), ("fp32", 4)):
        for name, kernel, inputs, outputs in (
            ("forward", swiglu_forward_kernel, ("gate_ptr", "up_ptr"), ("out_ptr",)),
            ("backward", swiglu_backward_kernel, ("dout_ptr", "gate_ptr", "up_ptr"), ("dgate_ptr", "dup_ptr")),
        ):
            launch = settings(f"swiglu {name}", 0, element_size=size, capability=arch)
            assert launch is not None
            signature = dict.fromkeys(inputs + outputs, f"*{kind}") | {"size": "i32:16"}
            constants = {"BLOCK": launch.block, "REAL": tl.float32}
            loads = len(inputs) * wide_loads(launch.block, size, launch.warps)
            yield Variant(
                f"swiglu {name} {kind}", kernel, signature, constants, launch.warps, launch.stages, wide_loads=loads
            )
        launch = settings("rotary", 0, element_size=size, capability=arch)
        assert launch is not None
        for heads, kv_heads, d in ((14, 14, 160), (32, 8, 128), (64, 8, 128)):
            signature = dict.fromkeys(("q_ptr", "k_ptr", "q_out_ptr", "k_out_ptr"), f"*{kind}")
            signature |= {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "positions": "i32", "direction": "fp32"}
            constants = _rotary_constants(heads, kv_heads, d, d // 2, copy_rest=True) | {"REAL": tl.float32}
            # At least q's two halves and k's.
            yield Variant(
                f"rotary {heads}/{kv_heads}x{d} {kind}", rotary_kernel, signature, constants, launch.warps,
                launch.stages, wide_loads=4,
            )  # fmt: skip
