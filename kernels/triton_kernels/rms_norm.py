"""RMSNorm in Triton: one program per row forward; backward, each program walks a share of the rows and keeps one
partial dW, summed afterwards in a fixed order (no atomics: the same bits every time). Rows too wide for registers are
read twice, block by block.

Bytes moved, T rows of M 16-bit values: forward 4TM, with residual 8TM; backward 6TM (8TM) + 8·programs·M."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from .configs import Launch, settings
from .launching import Variant, capability, on_device, options, real_of


@triton.jit
def forward_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, total_ptr, rstd_ptr, eps, width,
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
def wide_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, total_ptr, rstd_ptr, eps, width,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    # The loops' bound is the run-time `width`, so that they are not unrolled whole.
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros((BLOCK,), dtype=REAL)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < WIDTH
        at = row * WIDTH + column
        total = tl.load(x_ptr + at, mask=inside, other=0.0).to(REAL)
        if HAS_RESIDUAL:
            total += tl.load(residual_ptr + at, mask=inside, other=0.0).to(REAL)
        squares += total * total
    rstd = 1.0 / tl.sqrt(tl.sum(squares, 0) / WIDTH + eps)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < WIDTH
        at = row * WIDTH + column
        total = tl.load(x_ptr + at, mask=inside, other=0.0).to(REAL)
        if HAS_RESIDUAL:
            total += tl.load(residual_ptr + at, mask=inside, other=0.0).to(REAL)
            tl.store(total_ptr + at, total.to(total_ptr.dtype.element_ty), mask=inside)
        weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(REAL)
        tl.store(y_ptr + at, (total * rstd * weight).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def backward_kernel(
    dy_ptr, dtotal_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, parts_ptr, rows, width,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_DTOTAL: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(REAL)
    dweight = tl.zeros((BLOCK,), dtype=REAL)
    for row in range(program, rows, tl.num_programs(0)):
        # int64, and right for the interpreter's plain ints
        at = (tl.zeros((1,), dtype=tl.int64) + row) * WIDTH + column
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


@triton.jit
def wide_backward_kernel(
    dy_ptr, dtotal_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, parts_ptr, rows, width,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_DTOTAL: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """`parts` starts as zeros: a program adds each of its rows to its own part."""
    program = tl.program_id(0)
    for row in range(program, rows, tl.num_programs(0)):
        base = (tl.zeros((1,), dtype=tl.int64) + row) * WIDTH
        rstd = tl.load(rstd_ptr + row)
        dots = tl.zeros((BLOCK,), dtype=REAL)
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < WIDTH
            x = tl.load(x_ptr + base + column, mask=inside, other=0.0).to(REAL)
            dy = tl.load(dy_ptr + base + column, mask=inside, other=0.0).to(REAL)
            dots += dy * tl.load(weight_ptr + column, mask=inside, other=0.0).to(REAL) * (x * rstd)
        mean = tl.sum(dots, 0) / WIDTH
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < WIDTH
            normed = tl.load(x_ptr + base + column, mask=inside, other=0.0).to(REAL) * rstd
            dy = tl.load(dy_ptr + base + column, mask=inside, other=0.0).to(REAL)
            weighted = dy * tl.load(weight_ptr + column, mask=inside, other=0.0).to(REAL)
            dx = (weighted - normed * mean) * rstd
            if HAS_DTOTAL:
                dx += tl.load(dtotal_ptr + base + column, mask=inside, other=0.0).to(REAL)
            tl.store(dx_ptr + base + column, dx.to(dx_ptr.dtype.element_ty), mask=inside)
            part = parts_ptr + program.to(tl.int64) * WIDTH + column
            tl.store(part, tl.load(part, mask=inside, other=0.0) + dy * normed, mask=inside)


def _launch(direction: str, width: int, element_size: int, arch: int) -> tuple[Launch, bool]:
    """Settings for rows of `width` values, and whether the kernel that loops over columns is to run."""
    power = triton.next_power_of_2(max(width, 1))
    found = settings(f"rms_norm {direction}", power, element_size=element_size, capability=arch)
    if found is not None:
        return found._replace(block=power), False
    wide = settings("rms_norm wide", power, element_size=element_size, capability=arch)
    assert wide is not None
    return wide, True


def forward(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (…, M) → y, x + residual (x itself without one), rstd (…,)."""
    x, weight = x.contiguous(), weight.contiguous()
    wide_type, real = real_of(x)
    width = x.shape[-1]
    rows = x.numel() // max(width, 1)
    y = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    rstd = x.new_empty(x.shape[:-1], dtype=wide_type)
    if rows:
        launch, wide = _launch("forward", width, x.element_size(), capability(x))
        with on_device(x):
            (wide_forward_kernel if wide else forward_kernel)[(rows,)](
                x, x if residual is None else residual.contiguous(), weight, y, total, rstd, eps, width,
                WIDTH=width, BLOCK=launch.block, HAS_RESIDUAL=residual is not None, REAL=real, **options(launch),
            )  # fmt: skip
    return y, total, rstd


def backward(
    dy: torch.Tensor, dtotal: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x (and residual: they are equal) and of the weight, the latter in fp32 or wider."""
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    wide_type, real = real_of(x)
    width = x.shape[-1]
    rows = x.numel() // max(width, 1)
    dx = torch.empty_like(x)
    if not rows:
        return dx, torch.zeros(width, dtype=wide_type, device=x.device)
    launch, wide = _launch("backward", width, x.element_size(), capability(x))
    shape = min(rows, launch.programs), width
    parts = (torch.zeros if wide else torch.empty)(shape, dtype=wide_type, device=x.device)
    with on_device(x):
        (wide_backward_kernel if wide else backward_kernel)[(shape[0],)](
            dy, dy if dtotal is None else dtotal.contiguous(), x, weight, rstd, dx, parts, rows, width,
            WIDTH=width, BLOCK=launch.block, HAS_DTOTAL=dtotal is not None, REAL=real, **options(launch),
        )  # fmt: skip
    return dx, parts.sum(0)


WIDTHS = (128, 1024, 2240, 4096, 8192, 65536)
"""Compiled by tools/check_triton.py: the presets' among them, and one for the looping kernels."""


def variants(arch: int) -> Iterator[Variant]:
    """What is compiled without a GPU."""
    for width in WIDTHS:
        # fp16 differs from bf16 in one conversion: one width of it will do.
        for kind, size in (("fp32", 4), ("bf16", 2), *((("fp16", 2),) if width == 4096 else ())):
            for extra in (False, True):
                for direction in ("forward", "backward"):
                    yield _variant(direction, width, kind, size, extra, arch)
    yield _variant("forward", 2240, "bf16", 2, True, arch, weight="fp32")
    yield _variant("backward", 2240, "bf16", 2, True, arch, weight="fp32")


def _variant(
    direction: str, width: int, kind: str, size: int, extra: bool, arch: int, weight: str | None = None
) -> Variant:
    launch, wide = _launch(direction, width, size, arch)
    backward = direction == "backward"
    names = ("dy_ptr", "dtotal_ptr", "x_ptr", "dx_ptr") if backward else ("x_ptr", "residual_ptr", "y_ptr", "total_ptr")
    signature: dict[str, str] = dict.fromkeys(names, f"*{kind}")
    signature |= {"weight_ptr": f"*{weight or kind}", "rstd_ptr": "*fp32", "width": "i32:16"}
    signature |= {"parts_ptr": "*fp32", "rows": "i32"} if backward else {"eps": "fp32"}
    constants: dict[str, Any] = {"WIDTH": width, "BLOCK": launch.block, "REAL": tl.float32}
    constants["HAS_DTOTAL" if backward else "HAS_RESIDUAL"] = extra
    kernels = (wide_backward_kernel, backward_kernel) if backward else (wide_forward_kernel, forward_kernel)
    # A row that is no multiple of 16 bytes, or too short to give each thread 16, is read otherwise.
    at_once = 32 * launch.warps * 16 // size
    each = -(-min(width, launch.block) // at_once) if width * size % 16 == 0 and launch.block >= at_once else 0
    label = f"rms_norm {direction} {width} {kind}{' residual' if extra else ''}{' fp32 weight' if weight else ''}"
    # The weight's loads are wide too, but of another size where its type differs.
    tensors = (3 if backward else 2) + extra - (1 if weight else 0)
    return Variant(
        label, kernels[0 if wide else 1], signature, constants, launch.warps, launch.stages, wide_loads=tensors * each
    )
