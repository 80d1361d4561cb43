"""Attention in Triton: packed documents or dense, causal or not, sliding window, softcap, grouped query heads. The forward
kernel and the launchers; the backward kernels are in attention_backward.py.

Online softmax (arXiv:2205.14135, 2307.08691). Tiles outside the mask are not visited; only tiles on its edge are
masked. A head dim that is not a power of two is held as two: 160 = 128 + 32, not 256, so nothing is computed twice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from .attention_backward import delta_kernel, dkdv_kernel, dq_kernel
from .attention_tiles import LOG2E, bounds_of, capped, dot, load_rows, statistics_at, store_rows, visible
from .configs import Launch, settings
from .launching import Variant, capability, on_device, options, real_of

DELTA_ROWS = 16


@triton.jit
def _forward_tile(
    acc1, acc2, highest, total, q1, q2, k_base, v_base, start, rows, sq, sk, k_stride, scale, softcap, left, right,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    columns = start + tl.arange(0, BLOCK_N)
    scores = dot(q1, tl.trans(load_rows(k_base, columns, sk, k_stride, 0, D1, D)), REAL)
    if D2 > 0:
        scores += dot(q2, tl.trans(load_rows(k_base, columns, sk, k_stride, D1, D2, D)), REAL)
    scores = scores * scale
    if SOFTCAP:
        scores, _ = capped(scores, softcap)
    scores = scores * LOG2E
    if MASKED:
        seen = visible(rows[:, None], columns[None, :], sq, sk, left, right, CAUSAL, LEFT, RIGHT)
        scores = tl.where(seen, scores, float("-inf"))
    top = tl.maximum(highest, tl.max(scores, 1))
    shift = tl.where(top == float("-inf"), 0.0, top)
    p = tl.exp2(scores - shift[:, None])
    rescale = tl.exp2(highest - shift)
    total = total * rescale + tl.sum(p, 1)
    v1 = load_rows(v_base, columns, sk, k_stride, 0, D1, D)
    p = p.to(v1.dtype)
    acc1 = acc1 * rescale[:, None] + dot(p, v1, REAL)
    if D2 > 0:
        acc2 = acc2 * rescale[:, None] + dot(p, load_rows(v_base, columns, sk, k_stride, D1, D2, D), REAL)
    return acc1, acc2, top, total


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, cu_q_ptr, cu_k_ptr, scale, softcap, left, right, dense_q, dense_k, tiles,
    lse_stride,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PACKED: tl.constexpr, CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    # The last tiles of a causal document have most keys: they start first.
    tile = tiles - 1 - program % tiles
    head = (program // tiles) % H
    document = program // (tiles * H)
    q_begin, sq = bounds_of(cu_q_ptr, document, dense_q, PACKED)
    k_begin, sk = bounds_of(cu_k_ptr, document, dense_k, PACKED)
    if tile * BLOCK_M >= sq:
        return
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q_base = q_ptr + (q_begin * H + head) * D
    k_base = k_ptr + (k_begin * G + head // (H // G)) * D
    v_base = v_ptr + (k_begin * G + head // (H // G)) * D
    q1 = load_rows(q_base, rows, sq, H * D, 0, D1, D)
    q2 = q1
    acc1 = tl.zeros((BLOCK_M, D1), dtype=REAL)
    acc2 = acc1
    if D2 > 0:
        q2 = load_rows(q_base, rows, sq, H * D, D1, D2, D)
        acc2 = tl.zeros((BLOCK_M, D2), dtype=REAL)
    highest = tl.full((BLOCK_M,), float("-inf"), dtype=REAL)
    total = tl.zeros((BLOCK_M,), dtype=REAL)

    shift = sk - sq
    first_row = tile * BLOCK_M
    last_row = tl.minimum(first_row + BLOCK_M, sq) - 1
    begin, end = 0, sk  # keys some row sees
    full_begin, full_end = 0, sk // BLOCK_N * BLOCK_N  # keys in tiles every row sees whole
    if CAUSAL:
        end = tl.minimum(end, last_row + shift + 1)
        full_end = tl.minimum(full_end, (first_row + shift + 1) // BLOCK_N * BLOCK_N)
    if RIGHT:
        end = tl.minimum(end, last_row + shift + right + 1)
        full_end = tl.minimum(full_end, (first_row + shift + right + 1) // BLOCK_N * BLOCK_N)
    if LEFT:
        begin = tl.maximum(begin, first_row + shift - left) // BLOCK_N * BLOCK_N
        full_begin = (tl.maximum(full_begin, last_row + shift - left) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    full_end = tl.maximum(full_end, 0)
    full_begin = tl.minimum(tl.maximum(full_begin, begin), tl.maximum(full_end, begin))
    full_end = tl.maximum(full_end, full_begin)
    if LEFT:
        for start in range(begin, tl.minimum(full_begin, end), BLOCK_N):
            acc1, acc2, highest, total = _forward_tile(
                acc1, acc2, highest, total, q1, q2, k_base, v_base, start, rows, sq, sk, G * D, scale, softcap, left,
                right, D, D1, D2, BLOCK_N, CAUSAL, LEFT, RIGHT, SOFTCAP, True, REAL,
            )  # fmt: skip
    for start in range(full_begin, full_end, BLOCK_N):
        acc1, acc2, highest, total = _forward_tile(
            acc1, acc2, highest, total, q1, q2, k_base, v_base, start, rows, sq, sk, G * D, scale, softcap, left,
            right, D, D1, D2, BLOCK_N, CAUSAL, LEFT, RIGHT, SOFTCAP, False, REAL,
        )  # fmt: skip
    for start in range(full_end, end, BLOCK_N):
        acc1, acc2, highest, total = _forward_tile(
            acc1, acc2, highest, total, q1, q2, k_base, v_base, start, rows, sq, sk, G * D, scale, softcap, left,
            right, D, D1, D2, BLOCK_N, CAUSAL, LEFT, RIGHT, SOFTCAP, True, REAL,
        )  # fmt: skip

    empty = highest == float("-inf")
    inverse = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, total))
    lse = tl.where(empty, float("-inf"), (highest + tl.log2(tl.where(empty, 1.0, total))) / LOG2E)
    out_base = out_ptr + (q_begin * H + head) * D
    store_rows(out_base, rows, sq, H * D, acc1 * inverse[:, None], 0, D1, D)
    if D2 > 0:
        store_rows(out_base, rows, sq, H * D, acc2 * inverse[:, None], D1, D2, D)
    lse_base = statistics_at(lse_ptr, document, head, q_begin, lse_stride, H, PACKED)
    tl.store(lse_base + rows, lse, mask=rows < sq)


# ---- launchers ----


def split_head_dim(d: int) -> tuple[int, int]:
    """The largest power of two in d, and a power of two (at least 16, what a tensor core takes) for the rest, or 0."""
    first = 1 << (d.bit_length() - 1)
    rest = d - first
    return first, 0 if rest == 0 else max(16, 1 << (rest - 1).bit_length())


def _constants(
    q: torch.Tensor, k: torch.Tensor, packed: bool, causal: bool, left: int, right: int, softcap: float
) -> dict[str, Any]:
    d1, d2 = split_head_dim(q.shape[-1])
    return {
        "H": q.shape[-2], "G": k.shape[-2], "D": q.shape[-1], "D1": d1, "D2": d2, "PACKED": packed, "CAUSAL": causal,
        "LEFT": left >= 0, "RIGHT": right >= 0, "SOFTCAP": softcap > 0, "REAL": real_of(q)[1],
    }  # fmt: skip


def _launch(kernel: str, head_dim: int, element_size: int, arch: int) -> Launch:
    found = settings(f"attention {kernel}", head_dim, element_size=element_size, capability=arch)
    assert found is not None, head_dim
    return found


def _options(launch: Launch) -> dict[str, Any]:
    return {"BLOCK_M": launch.block, "BLOCK_N": launch.block_n, **options(launch)}


def _sizes(
    q: torch.Tensor, k: torch.Tensor, bounds: torch.Tensor | None, longest: int
) -> tuple[int, int, int, int, int]:
    """Documents, dense lengths (0 if packed), longest in queries and keys."""
    if bounds is None:
        return q.shape[0], q.shape[1], k.shape[1], q.shape[1], k.shape[1]
    return bounds.numel() - 1, 0, 0, longest, longest


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor | None, cu_k: torch.Tensor | None, longest: int,
    causal: bool, left: int, right: int, softcap: float, scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """out like q; lse (B, H, S), packed (H, T)."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    documents, dense_q, dense_k, longest_q, _ = _sizes(q, k, cu_q, longest)
    heads = q.shape[-2]
    out = torch.empty_like(q)
    shape = (heads, q.shape[0]) if cu_q is not None else (q.shape[0], heads, q.shape[1])
    lse = q.new_empty(shape, dtype=real_of(q)[0])
    launch = _launch("forward", q.shape[-1], q.element_size(), capability(q))
    tiles = triton.cdiv(longest_q, launch.block)
    if documents * tiles * heads:
        with on_device(q):
            forward_kernel[(documents * tiles * heads,)](
                q, k, v, out, lse, q if cu_q is None else cu_q, q if cu_k is None else cu_k, scale, softcap, left, right,
                dense_q, dense_k, tiles, lse.shape[-1],
                **_constants(q, k, cu_q is not None, causal, left, right, softcap), **_options(launch),
            )  # fmt: skip
    return out, lse


def backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    dlse: torch.Tensor | None, cu_q: torch.Tensor | None, cu_k: torch.Tensor | None, longest: int, causal: bool, left: int,
    right: int, softcap: float, scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """dq, dk, dv; `dlse` is the gradient of the log-sum-exp, if it has one."""
    dout, q, k, v, out, lse = (t.contiguous() for t in (dout, q, k, v, out, lse))
    documents, dense_q, dense_k, longest_q, longest_k = _sizes(q, k, cu_q, longest)
    heads, kv_heads, packed = q.shape[-2], k.shape[-2], cu_q is not None
    dq, dk, dv, delta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(lse)
    constants = _constants(q, k, packed, causal, left, right, softcap)
    bounds_q, bounds_k = q if cu_q is None else cu_q, q if cu_k is None else cu_k
    rest = (scale, softcap, left, right, dense_q, dense_k)
    with on_device(q):
        rows = triton.cdiv(longest_q, DELTA_ROWS)
        if documents * rows * heads:
            delta_kernel[(documents * rows * heads,)](
                dout, out, delta if dlse is None else dlse.contiguous(), delta, bounds_q, dense_q, rows, lse.shape[-1],
                H=heads, D=q.shape[-1], BLOCK_D=triton.next_power_of_2(q.shape[-1]), BLOCK_M=DELTA_ROWS, PACKED=packed,
                HAS_DLSE=dlse is not None, REAL=constants["REAL"], num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
        launch = _launch("dq", q.shape[-1], q.element_size(), capability(q))
        tiles = triton.cdiv(longest_q, launch.block)
        if documents * tiles * heads:
            dq_kernel[(documents * tiles * heads,)](
                dout, q, k, v, lse, delta, dq, bounds_q, bounds_k, *rest, tiles, lse.shape[-1], **constants,
                **_options(launch),
            )  # fmt: skip
        launch = _launch("dkdv", q.shape[-1], q.element_size(), capability(q))
        tiles = triton.cdiv(longest_k, launch.block_n)
        if documents * tiles * kv_heads:
            dkdv_kernel[(documents * tiles * kv_heads,)](
                dout, q, k, v, lse, delta, dk, dv, bounds_q, bounds_k, *rest, tiles, lse.shape[-1], **constants,
                **_options(launch),
            )  # fmt: skip
    return dq, dk, dv


def variants(arch: int) -> Iterator[Variant]:
    """What is compiled without a GPU: the head dims of the presets and of the tests, packed and causal, without and with
    every option; and what differs from that in type, layout or mask."""
    for d, heads, kv_heads in (
        (16, 4, 2), (32, 7, 1), (64, 8, 4), (80, 8, 8), (96, 8, 2), (128, 32, 8), (160, 14, 14), (192, 8, 2), (256, 8, 4),
    ):  # fmt: skip
        for full in (False, True):
            yield from _variants(arch, d, heads, kv_heads, "bf16", full=full)
    for d in (64, 128):
        yield from _variants(arch, d, 8, 4, "fp32", full=True)
    yield from _variants(arch, 128, 32, 8, "fp16")
    yield from _variants(arch, 128, 32, 8, "bf16", packed=False, causal=False)
    yield from _variants(arch, 160, 14, 14, "bf16", packed=False)


def _variants(
    arch: int, d: int, heads: int, kv_heads: int, kind: str, *, full: bool = False, packed: bool = True, causal: bool = True
) -> Iterator[Variant]:  # fmt: skip
    scalars = {"scale": "fp32", "softcap": "fp32"} | dict.fromkeys(
        ("left", "right", "dense_q", "dense_k", "tiles", "lse_stride"), "i32"
    )
    bounds = {"cu_q_ptr": "*i32", "cu_k_ptr": "*i32"} if packed else {"cu_q_ptr": "*bf16", "cu_k_ptr": "*bf16"}
    inputs = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), f"*{kind}")
    saved = {"dout_ptr": f"*{kind}"} | inputs | {"lse_ptr": "*fp32", "delta_ptr": "*fp32"}
    d1, d2 = split_head_dim(d)
    constants = {
        "H": heads, "G": kv_heads, "D": d, "D1": d1, "D2": d2, "PACKED": packed, "CAUSAL": causal, "LEFT": full,
        "RIGHT": full, "SOFTCAP": full, "REAL": tl.float32,
    }  # fmt: skip
    size = 4 if kind == "fp32" else 2
    traits = [kind, *(["dense"] if not packed else []), *(["full"] if not causal else [])]
    label = " ".join([f"D={d}", *traits, *(["window softcap"] if full else [])])
    for which, kernel, tensors in (
        ("forward", forward_kernel, inputs | {"out_ptr": f"*{kind}", "lse_ptr": "*fp32"}),
        ("dq", dq_kernel, saved | {"dq_ptr": f"*{kind}"}),
        ("dkdv", dkdv_kernel, saved | {"dk_ptr": f"*{kind}", "dv_ptr": f"*{kind}"}),
    ):
        launch = _launch(which, d, size, arch)
        yield Variant(
            f"attention {which} {label}", kernel, tensors | bounds | scalars,
            constants | {"BLOCK_M": launch.block, "BLOCK_N": launch.block_n}, launch.warps, launch.stages,
            # A tile of few and short rows has less than 16 bytes for each thread.
            wide_loads=8 if d >= 64 else 1,
            # fp32 goes through tf32, whose instruction is another; the backward of head dim 256 has no room for tiles of 64
            # rows, which Hopper's instruction takes.
            tensor_cores=size == 2 and (which == "forward" or d <= 192),
        )  # fmt: skip
    delta = {"dout_ptr": f"*{kind}", "out_ptr": f"*{kind}", "dlse_ptr": "*fp32", "delta_ptr": "*fp32"}
    delta |= {"cu_q_ptr": bounds["cu_q_ptr"]} | {n: scalars[n] for n in ("dense_q", "tiles", "lse_stride")}
    shape = {"H": heads, "D": d, "BLOCK_D": triton.next_power_of_2(d), "BLOCK_M": DELTA_ROWS, "PACKED": packed}
    yield Variant(f"attention delta {label}", delta_kernel, delta, shape | {"HAS_DLSE": full, "REAL": tl.float32}, 4)
