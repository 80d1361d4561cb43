"""Cross entropy in Triton: one program per row; one pass over it forward (online softmax), one backward, which may write
over the logits. Bytes moved, 16-bit: forward 2·T·V, backward 4·T·V.

The width V is a compile-time constant: with a run-time one the compiler cannot prove 16-byte alignment and loads 2 bytes
at a time. The loops' bound is nevertheless the run-time `width`: unrolled whole, three blocks of capped fp32 logits make
LLVM crash for sm_90 (triton 3.8)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from .configs import Launch, settings
from .launching import Variant, capability, on_device, options, real_of, wide_loads


@triton.jit
def _capped(x, softcap, SOFTCAP: tl.constexpr):
    """softcap · tanh(x / softcap) and 1 − tanh², or x and 1."""
    if SOFTCAP:
        tanh = 2.0 * tl.sigmoid(2.0 * x / softcap) - 1.0
        return softcap * tanh, 1.0 - tanh * tanh
    return x, tl.full(x.shape, 1.0, x.dtype)


@triton.jit
def _statistics(
    row_ptr, width, softcap, V: tl.constexpr, BLOCK: tl.constexpr, SOFTCAP: tl.constexpr, REAL: tl.constexpr
):
    """Largest value, Σ exp(x − largest), Σ x. A NaN reaches the sum through exp; a row of −inf alone sums to 0."""
    highest = tl.full((BLOCK,), float("-inf"), dtype=REAL)
    total = tl.zeros((BLOCK,), dtype=REAL)
    plain = tl.zeros((BLOCK,), dtype=REAL)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < V
        x, _ = _capped(tl.load(row_ptr + column, mask=inside, other=0.0).to(REAL), softcap, SOFTCAP)
        plain += tl.where(inside, x, 0.0)
        x = tl.where(inside, x, float("-inf"))
        # Each lane keeps its own maximum: no exchange between threads inside the loop.
        top = tl.maximum(highest, x)
        shift = tl.where(top == float("-inf"), 0.0, top)
        total = total * tl.exp(highest - shift) + tl.exp(x - shift)
        highest = top
    largest = tl.max(highest, 0)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    return largest, tl.sum(total * tl.exp(highest - shift), 0), tl.sum(plain, 0)


@triton.jit
def forward_kernel(
    logits_ptr, targets_ptr, loss_ptr, lse_ptr, width, ignore_index, z_loss, smoothing, softcap,
    V: tl.constexpr, BLOCK: tl.constexpr, SOFTCAP: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row).to(tl.int64)
    row_ptr = logits_ptr + row * V
    largest, total, plain = _statistics(row_ptr, width, softcap, V, BLOCK, SOFTCAP, REAL)
    lse = tl.where(largest == float("inf"), largest, largest + tl.log(total))
    known = (target >= 0) & (target < V)
    chosen, _ = _capped(tl.load(row_ptr + target, mask=known, other=0.0).to(REAL), softcap, SOFTCAP)
    # Without smoothing a masked logit, −inf, must not turn into 0 · inf.
    spread = tl.where(smoothing > 0.0, smoothing * plain / V, 0.0)
    loss = lse - (1.0 - smoothing) * chosen - spread + z_loss * lse * lse
    tl.store(loss_ptr + row, tl.where(target == ignore_index, 0.0, loss))
    tl.store(lse_ptr + row, lse)


@triton.jit
def stats_kernel(
    logits_ptr, targets_ptr, highest_ptr, total_ptr, chosen_ptr, width, vocab_start, softcap,
    V: tl.constexpr, BLOCK: tl.constexpr, SOFTCAP: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    local = tl.load(targets_ptr + row).to(tl.int64) - vocab_start
    row_ptr = logits_ptr + row * V
    largest, total, _ = _statistics(row_ptr, width, softcap, V, BLOCK, SOFTCAP, REAL)
    here = (local >= 0) & (local < V)
    tl.store(highest_ptr + row, largest)
    tl.store(total_ptr + row, total)
    chosen, _ = _capped(tl.load(row_ptr + local, mask=here, other=0.0).to(REAL), softcap, SOFTCAP)
    tl.store(chosen_ptr + row, chosen)


@triton.jit
def backward_kernel(
    dloss_ptr, logits_ptr, targets_ptr, lse_ptr, grad_ptr, width, vocab_start, ignore_index, z_loss, smoothing, softcap,
    V: tl.constexpr, BLOCK: tl.constexpr, SOFTCAP: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row).to(tl.int64)
    local = target - vocab_start
    ignored = target == ignore_index
    scale = tl.load(dloss_ptr + row)
    lse = tl.load(lse_ptr + row)
    whole = scale * (1.0 + 2.0 * z_loss * lse)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < V
        x, slope = _capped(tl.load(logits_ptr + row * V + column, mask=inside, other=0.0).to(REAL), softcap, SOFTCAP)
        grad = whole * tl.exp(x - lse) - scale * smoothing / V
        grad = (grad - tl.where(column == local, scale * (1.0 - smoothing), 0.0)) * slope
        # Not grad · 0: an ignored row may hold infinities.
        grad = tl.where(ignored, 0.0, grad)
        tl.store(grad_ptr + row * V + column, grad.to(grad_ptr.dtype.element_ty), mask=inside)


def _row_statistics(logits: torch.Tensor, number: int) -> list[torch.Tensor]:
    return [logits.new_empty(logits.shape[0], dtype=real_of(logits)[0]) for _ in range(number)]


def _launch(width: int, element_size: int, arch: int) -> Launch:
    found = settings("cross_entropy", width, element_size=element_size, capability=arch)
    assert found is not None
    return found._replace(block=min(found.block, triton.next_power_of_2(max(width, 1))))


def _options(logits: torch.Tensor) -> dict[str, Any]:
    launch = _launch(logits.shape[1], logits.element_size(), capability(logits))
    return {"V": logits.shape[1], "BLOCK": launch.block, **options(launch)}


def ce_forward(
    logits: torch.Tensor, targets: torch.Tensor, ignore_index: int, z_loss: float, label_smoothing: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Token losses and log-sum-exps of logits (T, V), each (T,)."""
    logits, targets = logits.contiguous(), targets.contiguous()
    loss, lse = _row_statistics(logits, 2)
    if logits.shape[0]:
        with on_device(logits):
            forward_kernel[(logits.shape[0],)](
                logits, targets, loss, lse, logits.shape[1], ignore_index, z_loss, label_smoothing, softcap or 1.0,
                SOFTCAP=softcap is not None, REAL=real_of(logits)[1], **_options(logits),
            )  # fmt: skip
    return loss, lse


def ce_stats(
    logits: torch.Tensor, targets: torch.Tensor, vocab_start: int, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Largest logit, Σ exp(logit − largest) and the target's logit (0 if it is not in this shard), each (T,)."""
    logits, targets = logits.contiguous(), targets.contiguous()
    highest, total, chosen = _row_statistics(logits, 3)
    if logits.shape[0]:
        with on_device(logits):
            stats_kernel[(logits.shape[0],)](
                logits, targets, highest, total, chosen, logits.shape[1], vocab_start, softcap or 1.0,
                SOFTCAP=softcap is not None, REAL=real_of(logits)[1], **_options(logits),
            )  # fmt: skip
    return highest, total, chosen


def ce_backward(
    dloss: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor, lse: torch.Tensor, vocab_start: int,
    ignore_index: int, z_loss: float, label_smoothing: float, softcap: float | None, *, out: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """Gradient of the logits (T, V), into `out` if given, which may be the logits if they are contiguous."""
    wide, real = real_of(logits)
    dloss, lse = dloss.to(wide).contiguous(), lse.to(wide).contiguous()
    logits, targets = logits.contiguous(), targets.contiguous()
    grad = torch.empty_like(logits) if out is None else out
    if logits.shape[0]:
        with on_device(logits):
            backward_kernel[(logits.shape[0],)](
                dloss, logits, targets, lse, grad, logits.shape[1], vocab_start, ignore_index, z_loss, label_smoothing,
                softcap or 1.0,
                SOFTCAP=softcap is not None, REAL=real, **_options(logits),
            )  # fmt: skip
    return grad


def variants(arch: int) -> Iterator[Variant]:
    """What is compiled without a GPU: the presets' vocabularies, whole and split over 8 ranks."""
    for kind, size in (("bf16", 2), ("fp32", 4)):
        for width in (96640, 96640 // 8):
            launch = _launch(width, size, arch)
            constants = {"V": width, "BLOCK": launch.block, "REAL": tl.float32}
            rows = {"logits_ptr": f"*{kind}", "targets_ptr": "*i64", "width": "i32:16"}
            scalars = {"ignore_index": "i32", "z_loss": "fp32", "smoothing": "fp32", "softcap": "fp32"}
            forward_types = rows | {"loss_ptr": "*fp32", "lse_ptr": "*fp32"} | scalars
            stats_types = rows | dict.fromkeys(("highest_ptr", "total_ptr", "chosen_ptr"), "*fp32")
            stats_types |= {"vocab_start": "i32", "softcap": "fp32"}
            backward_types = rows | {"dloss_ptr": "*fp32", "lse_ptr": "*fp32", "grad_ptr": f"*{kind}"} | scalars
            backward_types |= {"vocab_start": "i32"}
            for name, kernel, signature, extra in (
                ("forward", forward_kernel, forward_types, {"SOFTCAP": False}),
                ("forward softcap", forward_kernel, forward_types, {"SOFTCAP": True}),
                ("stats", stats_kernel, stats_types, {"SOFTCAP": False}),
                ("backward", backward_kernel, backward_types, {"SOFTCAP": False}),
                ("backward softcap", backward_kernel, backward_types, {"SOFTCAP": True}),
            ):
                yield Variant(
                    f"cross_entropy {name} {width} {kind}", kernel, signature, constants | extra, launch.warps,
                    launch.stages, wide_loads=wide_loads(launch.block, size, launch.warps),
                )  # fmt: skip
