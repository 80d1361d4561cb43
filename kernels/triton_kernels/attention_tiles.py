"""What the attention kernels share: the bounds of a document, rows of a head in and out, products, the mask, the place of a
row's statistics."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def bounds_of(cu_ptr, document, length, PACKED: tl.constexpr):
    """First token and length of a document; dense ones have one length."""
    if PACKED:
        begin = tl.load(cu_ptr + document).to(tl.int64)
        length = (tl.load(cu_ptr + document + 1) - begin).to(tl.int32)
    else:
        begin = document.to(tl.int64) * length
    return begin, length


@triton.jit
def load_rows(base, rows, count, stride, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Dims [START, START + WIDTH) of `rows` of a head, 0 beyond `count` rows and D dims."""
    column = START + tl.arange(0, WIDTH)
    at = base + rows.to(tl.int64)[:, None] * stride + column[None, :]
    inside = rows[:, None] < count
    if START + WIDTH > D:
        inside = inside & (column[None, :] < D)
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def store_rows(base, rows, count, stride, values, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    column = START + tl.arange(0, WIDTH)
    at = base + rows.to(tl.int64)[:, None] * stride + column[None, :]
    inside = rows[:, None] < count
    if START + WIDTH > D:
        inside = inside & (column[None, :] < D)
    tl.store(at, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def dot(a, b, REAL: tl.constexpr):
    """fp32 as three tf32 products, whose error is fp32's own: exact ones have no tensor core and spill."""
    if a.dtype == tl.float32:
        return tl.dot(a, b, input_precision="tf32x3", out_dtype=REAL)
    return tl.dot(a, b, input_precision="ieee", out_dtype=REAL)


@triton.jit
def capped(scores, softcap):
    """softcap · tanh(scores / softcap), and the tanh; written with a sigmoid, which every backend has."""
    tanh = 2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0
    return softcap * tanh, tanh


@triton.jit
def visible(query, key, sq, sk, left, right, CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Whether queries may see keys, both already broadcast against each other; positions within the document."""
    distance = key - (query + (sk - sq))
    seen = (key < sk) & (query < sq)
    if CAUSAL:
        seen = seen & (distance <= 0)
    if LEFT:
        seen = seen & (distance >= -left)
    if RIGHT:
        seen = seen & (distance <= right)
    return seen


@triton.jit
def statistics_at(base, document, head, q_begin, stride, H: tl.constexpr, PACKED: tl.constexpr):
    """Where a head's row statistics of a document begin: (H, T) packed, (B, H, S) dense."""
    if PACKED:
        at = (q_begin * 0 + head) * stride + q_begin  # int64 through q_begin
    else:
        at = (document.to(tl.int64) * H + head) * stride
    return base + at
