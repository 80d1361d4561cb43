"""RMSNorm in Triton: one program per row forward; backward, each program walks a share of the rows and keeps one
partial dW, summed afterwards in a fixed order (no atomics: the same bits every time).

Bytes moved, T rows of M 16-bit values: forward 4TM, with residual 8TM; backward 6TM (8TM) + 8·programs·M."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

from .configs import launch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Read by Triton itself when it is imported; kernels defined below are interpreted if it is set."""
MAX_WIDTH = 32768


@triton.jit
def forward_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, total_ptr, rstd_ptr, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # int64: row · WIDTH passes 2³¹ on large batches
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    at = row * WIDTH + column
    total = tl.load(x_ptr + at, mask=inside, other=0.0).to(REAL)
    if HAS_RESIDUAL:
        total += tl.load(residual_ptr + at, mask=inside, other=0.0).to(REAL)
        tl.store(total_ptr + at, total.to(total_ptr.dtype.element_ty), mask=inside)
    rstd = 1.0 / tl.sqrt(tl.sum(total * total, 0) / WIDTH + eps)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(REAL)
    tl.store(y_ptr + at, (total * rstd * weight).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def backward_kernel(
    dy_ptr, dtotal_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, parts_ptr, rows,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_DTOTAL: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(REAL)
    dweight = tl.zeros((BLOCK,), dtype=REAL)
    for row in range(program, rows, tl.num_programs(0)):
        at = (
            tl.zeros((1,), dtype=tl.int64) + row
        ) * WIDTH + column  # int64, and right for the interpreter's plain ints
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(REAL)
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(REAL)
        rstd = tl.load(rstd_ptr + row)
        normed = x * rstd
        weighted = dy * weight
        mean = tl.sum(weighted * normed, 0) / WIDTH
        dx = (weighted - normed * mean) * rstd
        if HAS_DTOTAL:
            dx += tl.load(dtotal_ptr + at, mask=inside, other=0.0).to(REAL)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        dweight += dy * normed
    tl.store(parts_ptr + program.to(tl.int64) * WIDTH + column, dweight, mask=inside)


def _real(x: torch.Tensor) -> tuple[torch.dtype, tl.dtype]:
    return (torch.float64, tl.float64) if x.dtype == torch.float64 else (torch.float32, tl.float32)


def forward(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (…, M) → y, x + residual (x itself without one), rstd (…,)."""
    x, weight = x.contiguous(), weight.contiguous()
    wide, real = _real(x)
    width = x.shape[-1]
    rows = x.numel() // max(width, 1)
    y = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    rstd = x.new_empty(x.shape[:-1], dtype=wide)
    if rows:
        settings = launch(width, rows)
        with _on_device(x):
            forward_kernel[(rows,)](
                x, x if residual is None else residual.contiguous(), weight, y, total, rstd, eps,
                WIDTH=width, BLOCK=settings.block, HAS_RESIDUAL=residual is not None, REAL=real,
                num_warps=settings.warps, enable_fp_fusion=True,
            )  # fmt: skip
    return y, total, rstd


def backward(
    dy: torch.Tensor, dtotal: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x (and residual: they are equal) and of the weight, the latter in fp32 or wider."""
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    wide, real = _real(x)
    width = x.shape[-1]
    rows = x.numel() // max(width, 1)
    dx = torch.empty_like(x)
    if not rows:
        return dx, torch.zeros(width, dtype=wide, device=x.device)
    settings = launch(width, rows)
    parts = torch.empty(settings.programs, width, dtype=wide, device=x.device)
    with _on_device(x):
        backward_kernel[(settings.programs,)](
            dy, dy if dtotal is None else dtotal.contiguous(), x, weight, rstd, dx, parts, rows,
            WIDTH=width, BLOCK=settings.block, HAS_DTOTAL=dtotal is not None, REAL=real,
            num_warps=settings.warps, enable_fp_fusion=True,
        )  # fmt: skip
    return dx, parts.sum(0)


def _on_device(x: torch.Tensor) -> torch.cuda.device:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(x.device if x.device.type == "cuda" else -1)
