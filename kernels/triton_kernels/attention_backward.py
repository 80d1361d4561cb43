"""The backward kernels of attention: delta, then one pass that owns rows of dq and one that owns rows of dk and dv, so that
nothing is added atomically and the bits repeat. Scores are made again from q, k and the log-sum-exp."""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_tiles import LOG2E, bounds_of, capped, dot, load_rows, statistics_at, store_rows, visible


@triton.jit
def delta_kernel(
    dout_ptr, out_ptr, dlse_ptr, delta_ptr, cu_q_ptr, dense_q, tiles, lse_stride,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, PACKED: tl.constexpr,
    HAS_DLSE: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """delta = Σ dout · out − dlse of each row."""
    program = tl.program_id(0)
    head = (program // tiles) % H
    document = program // (tiles * H)
    q_begin, sq = bounds_of(cu_q_ptr, document, dense_q, PACKED)
    rows = (program % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    offset = (q_begin * H + head) * D
    dout = load_rows(dout_ptr + offset, rows, sq, H * D, 0, BLOCK_D, D).to(REAL)
    out = load_rows(out_ptr + offset, rows, sq, H * D, 0, BLOCK_D, D).to(REAL)
    delta = tl.sum(dout * out, 1)
    if HAS_DLSE:
        dlse_base = statistics_at(dlse_ptr, document, head, q_begin, lse_stride, H, PACKED)
        delta -= tl.load(dlse_base + rows, mask=rows < sq, other=0.0)
    delta_base = statistics_at(delta_ptr, document, head, q_begin, lse_stride, H, PACKED)
    tl.store(delta_base + rows, delta, mask=rows < sq)


@triton.jit
def dq_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dq_ptr, cu_q_ptr, cu_k_ptr, scale, softcap, left, right,
    dense_q, dense_k, tiles, lse_stride,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PACKED: tl.constexpr, CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tile = tiles - 1 - program % tiles
    head = (program // tiles) % H
    document = program // (tiles * H)
    q_begin, sq = bounds_of(cu_q_ptr, document, dense_q, PACKED)
    k_begin, sk = bounds_of(cu_k_ptr, document, dense_k, PACKED)
    if tile * BLOCK_M >= sq:
        return
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q_offset = (q_begin * H + head) * D
    k_base = k_ptr + (k_begin * G + head // (H // G)) * D
    v_base = v_ptr + (k_begin * G + head // (H // G)) * D
    q1 = load_rows(q_ptr + q_offset, rows, sq, H * D, 0, D1, D)
    g1 = load_rows(dout_ptr + q_offset, rows, sq, H * D, 0, D1, D)
    q2, g2 = q1, g1
    dq1 = tl.zeros((BLOCK_M, D1), dtype=REAL)
    dq2 = dq1
    if D2 > 0:
        q2 = load_rows(q_ptr + q_offset, rows, sq, H * D, D1, D2, D)
        g2 = load_rows(dout_ptr + q_offset, rows, sq, H * D, D1, D2, D)
        dq2 = tl.zeros((BLOCK_M, D2), dtype=REAL)
    lse = tl.load(
        statistics_at(lse_ptr, document, head, q_begin, lse_stride, H, PACKED) + rows, mask=rows < sq, other=0.0
    )
    delta = tl.load(
        statistics_at(delta_ptr, document, head, q_begin, lse_stride, H, PACKED) + rows, mask=rows < sq, other=0.0
    )
    lse = tl.where(lse == float("-inf"), 0.0, lse) * LOG2E

    shift = sk - sq
    first_row = tile * BLOCK_M
    last_row = tl.minimum(first_row + BLOCK_M, sq) - 1
    begin, end = 0, sk
    if CAUSAL:
        end = tl.minimum(end, last_row + shift + 1)
    if RIGHT:
        end = tl.minimum(end, last_row + shift + right + 1)
    if LEFT:
        begin = tl.maximum(begin, first_row + shift - left) // BLOCK_N * BLOCK_N
    for start in range(begin, end, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        k1 = load_rows(k_base, columns, sk, G * D, 0, D1, D)
        scores = dot(q1, tl.trans(k1), REAL)
        dp = dot(g1, tl.trans(load_rows(v_base, columns, sk, G * D, 0, D1, D)), REAL)
        k2 = k1
        if D2 > 0:
            k2 = load_rows(k_base, columns, sk, G * D, D1, D2, D)
            scores += dot(q2, tl.trans(k2), REAL)
            dp += dot(g2, tl.trans(load_rows(v_base, columns, sk, G * D, D1, D2, D)), REAL)
        scores = scores * scale
        slope = 1.0
        if SOFTCAP:
            scores, tanh = capped(scores, softcap)
            slope = 1.0 - tanh * tanh
        seen = visible(rows[:, None], columns[None, :], sq, sk, left, right, CAUSAL, LEFT, RIGHT)
        p = tl.where(seen, tl.exp2(scores * LOG2E - lse[:, None]), 0.0)
        ds = (p * (dp - delta[:, None]) * slope).to(k1.dtype)
        dq1 += dot(ds, k1, REAL)
        if D2 > 0:
            dq2 += dot(ds, k2, REAL)
    store_rows(dq_ptr + q_offset, rows, sq, H * D, dq1 * scale, 0, D1, D)
    if D2 > 0:
        store_rows(dq_ptr + q_offset, rows, sq, H * D, dq2 * scale, D1, D2, D)


@triton.jit
def dkdv_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, cu_q_ptr, cu_k_ptr, scale, softcap, left, right,
    dense_q, dense_k, tiles, lse_stride,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PACKED: tl.constexpr, CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tile = program % tiles  # the first tiles of a causal document are seen by most queries
    kv_head = (program // tiles) % G
    document = program // (tiles * G)
    q_begin, sq = bounds_of(cu_q_ptr, document, dense_q, PACKED)
    k_begin, sk = bounds_of(cu_k_ptr, document, dense_k, PACKED)
    if tile * BLOCK_N >= sk:
        return
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k_offset = (k_begin * G + kv_head) * D
    k1 = load_rows(k_ptr + k_offset, columns, sk, G * D, 0, D1, D)
    v1 = load_rows(v_ptr + k_offset, columns, sk, G * D, 0, D1, D)
    k2, v2 = k1, v1
    dk1 = tl.zeros((BLOCK_N, D1), dtype=REAL)
    dv1 = tl.zeros((BLOCK_N, D1), dtype=REAL)
    dk2, dv2 = dk1, dv1
    if D2 > 0:
        k2 = load_rows(k_ptr + k_offset, columns, sk, G * D, D1, D2, D)
        v2 = load_rows(v_ptr + k_offset, columns, sk, G * D, D1, D2, D)
        dk2 = tl.zeros((BLOCK_N, D2), dtype=REAL)
        dv2 = tl.zeros((BLOCK_N, D2), dtype=REAL)

    shift = sk - sq
    first_key = tile * BLOCK_N
    last_key = tl.minimum(first_key + BLOCK_N, sk) - 1
    begin, end = 0, sq
    if CAUSAL:
        begin = tl.maximum(begin, first_key - shift)
    if RIGHT:
        begin = tl.maximum(begin, first_key - shift - right)
    if LEFT:
        end = tl.minimum(end, last_key - shift + left + 1)
    begin = begin // BLOCK_M * BLOCK_M
    for head in range(kv_head * (H // G), (kv_head + 1) * (H // G)):
        q_offset = (q_begin * H + head) * D
        lse_base = statistics_at(lse_ptr, document, head, q_begin, lse_stride, H, PACKED)
        delta_base = statistics_at(delta_ptr, document, head, q_begin, lse_stride, H, PACKED)
        for start in range(begin, end, BLOCK_M):
            rows = start + tl.arange(0, BLOCK_M)
            q1 = load_rows(q_ptr + q_offset, rows, sq, H * D, 0, D1, D)
            g1 = load_rows(dout_ptr + q_offset, rows, sq, H * D, 0, D1, D)
            scores = dot(k1, tl.trans(q1), REAL)  # (keys, queries)
            dp = dot(v1, tl.trans(g1), REAL)
            q2, g2 = q1, g1
            if D2 > 0:
                q2 = load_rows(q_ptr + q_offset, rows, sq, H * D, D1, D2, D)
                g2 = load_rows(dout_ptr + q_offset, rows, sq, H * D, D1, D2, D)
                scores += dot(k2, tl.trans(q2), REAL)
                dp += dot(v2, tl.trans(g2), REAL)
            lse = tl.load(lse_base + rows, mask=rows < sq, other=0.0)
            delta = tl.load(delta_base + rows, mask=rows < sq, other=0.0)
            lse = tl.where(lse == float("-inf"), 0.0, lse) * LOG2E
            scores = scores * scale
            slope = 1.0
            if SOFTCAP:
                scores, tanh = capped(scores, softcap)
                slope = 1.0 - tanh * tanh
            seen = visible(rows[None, :], columns[:, None], sq, sk, left, right, CAUSAL, LEFT, RIGHT)
            p = tl.where(seen, tl.exp2(scores * LOG2E - lse[None, :]), 0.0)
            dv1 += dot(p.to(g1.dtype), g1, REAL)
            ds = (p * (dp - delta[None, :]) * slope).to(q1.dtype)
            dk1 += dot(ds, q1, REAL)
            if D2 > 0:
                dv2 += dot(p.to(g1.dtype), g2, REAL)
                dk2 += dot(ds, q2, REAL)
    store_rows(dk_ptr + k_offset, columns, sk, G * D, dk1 * scale, 0, D1, D)
    store_rows(dv_ptr + k_offset, columns, sk, G * D, dv1, 0, D1, D)
    if D2 > 0:
        store_rows(dk_ptr + k_offset, columns, sk, G * D, dk2 * scale, D1, D2, D)
        store_rows(dv_ptr + k_offset, columns, sk, G * D, dv2, D1, D2, D)
