"""The public function `linear_cross_entropy`: cross entropy of x · weightᵀ without the logits ever being whole.

Tokens go through in chunks: one product for the logits, the loss and its gradient in place over them, two products for
the gradients of x and weight. Three products of 2·T·M·V each, as in the plain computation, and the logits of one chunk
instead of all; methods that recompute the logits need four. The gradients are worked out in the forward pass while the
logits are at hand and scaled in the backward pass. dW is summed in fp32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from . import _checks
from ._dispatch import choose, register
from ._library import CPP_MISSING, TRITON_MISSING, cpp_supports, statistics_type, triton_supports
from .cross_entropy import IGNORE, ce_grad, ce_stats
from .reference import cross_entropy as _reference

Combine = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(max, sumexp, target_logit) of this shard, each (T,) → (lse, target_logit) over the whole vocabulary."""

CHUNK_BYTES = 96 << 20
"""Logits of one chunk, about: large enough for the products to run at full rate, small beside the rest of a step."""


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int = IGNORE,
    z_loss: float = 0.0,
    reduction: str = "mean",
    vocab_start: int = 0,
    combine: Combine | None = None,
    chunk_tokens: int | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Cross entropy of logits = x (T, M) · weight (V, M)ᵀ with targets (T,); options as `cross_entropy`.

    Vocabulary-parallel: `weight` holds the rows from `vocab_start` on and `combine` turns a chunk's statistics into those
    of the whole vocabulary (the collective is the caller's); the gradient of x is then this shard's part of the sum.
    `reduction="none"` recomputes the logits in the backward pass, as the upstream gradients are not known before."""
    _checks.floating("linear_cross_entropy", x=x, weight=weight)
    _checks.same_dtype("linear_cross_entropy", x=x, weight=weight)
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"linear_cross_entropy: x must be (T, M) and weight (V, M), got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    _checks.targets("linear_cross_entropy", x, targets)
    _checks.loss_options("linear_cross_entropy", reduction, 0.0, None)
    if combine is None:
        _checks.target_range("linear_cross_entropy", targets, weight.shape[0], ignore_index)
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"linear_cross_entropy: chunk_tokens={chunk_tokens}; it must be positive")
    if ignore_index != IGNORE:  # the halves know one mark only
        targets = targets.masked_fill(targets == ignore_index, IGNORE)
    options: dict[str, Any] = {"z_loss": z_loss, "reduction": reduction, "vocab_start": vocab_start, "combine": combine}
    options["chunk_tokens"] = chunk_tokens or max(1, CHUNK_BYTES // max(1, weight.shape[0] * weight.element_size()))
    chosen = choose("linear_cross_entropy", impl, x.device.type, x, weight, targets, **options)
    loss: torch.Tensor = chosen.run(x, weight, targets, **options)
    return loss


def _reference_supports(*args: Any, combine: Combine | None = None, **options: Any) -> str | None:
    return None if combine is None else "the reference knows whole vocabularies only"


@register("linear_cross_entropy", "reference", _reference_supports)
def _run_reference(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, z_loss: float, reduction: str, **options: Any
) -> torch.Tensor:
    wide = statistics_type(x)
    logits = x.to(wide) @ weight.to(wide).t()
    return _reference.cross_entropy(logits, targets, z_loss=z_loss, reduction=reduction)


class _Settings(NamedTuple):
    """Everything but the tensors."""

    halves: str
    """Implementation of ce_stats and ce_grad."""
    z_loss: float
    vocab_start: int
    combine: Combine
    chunk_tokens: int
    at_once: bool
    """Work out the gradients in the forward pass, for a sum of the losses."""


def _alone(
    highest: torch.Tensor, sum_exp: torch.Tensor, target_logit: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return highest + sum_exp.log(), target_logit


def _chunked(
    halves: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    z_loss: float,
    reduction: str,
    vocab_start: int,
    combine: Combine | None,
    chunk_tokens: int,
) -> torch.Tensor:
    at_once = reduction != "none" and torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    settings = _Settings(halves, z_loss, vocab_start, combine or _alone, chunk_tokens, at_once)
    loss: torch.Tensor = _LinearCrossEntropy.apply(x, weight, targets, settings)
    if reduction == "none":
        return loss
    return _reference.reduced(loss, targets != IGNORE, reduction)


class _LinearCrossEntropy(torch.autograd.Function):
    """Token losses (T,), or with `at_once` their sum, 0-dim."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, settings: _Settings
    ) -> torch.Tensor:
        ctx.settings = settings
        loss, lse = (x.new_zeros(x.shape[0], dtype=statistics_type(x)) for _ in range(2))
        gradients = _Gradients(x, weight, ctx.needs_input_grad) if settings.at_once else None
        for rows, logits in _logits(x, weight, settings):
            stats = ce_stats(logits, targets[rows], settings.vocab_start, impl=settings.halves)
            lse[rows], target_logit = settings.combine(*stats)
            token_loss = lse[rows] - target_logit + settings.z_loss * lse[rows] ** 2
            loss[rows] = token_loss.masked_fill(targets[rows] == IGNORE, 0)
            if gradients is not None:
                gradients.add(rows, logits, targets[rows], lse[rows], 1.0, settings)
        ctx.gradients = gradients
        if gradients is not None:
            return loss.sum()
        ctx.save_for_backward(x, weight, targets, lse)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, Any, None, None]:
        if ctx.settings.at_once:
            gradients, ctx.gradients = ctx.gradients, None
            if gradients is None:
                raise RuntimeError("linear_cross_entropy: its gradients are used up; a second backward is not offered")
            return *gradients.finish(grad), None, None
        x, weight, targets, lse = ctx.saved_tensors
        gradients = _Gradients(x, weight, ctx.needs_input_grad)
        for rows, logits in _logits(x, weight, ctx.settings):
            gradients.add(rows, logits, targets[rows], lse[rows], grad[rows], ctx.settings)
        return *gradients.finish(None), None, None


def _logits(x: torch.Tensor, weight: torch.Tensor, settings: _Settings) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows and their logits (chunk, V), in one buffer that may be written to and is overwritten by the next."""
    tokens = x.shape[0]
    buffer = x.new_empty(min(settings.chunk_tokens, tokens), weight.shape[0])
    for start in range(0, tokens, settings.chunk_tokens):
        rows = slice(start, min(start + settings.chunk_tokens, tokens))
        yield rows, torch.mm(x[rows], weight.t(), out=buffer[: rows.stop - rows.start])


class _Gradients:
    """dx (T, M) and dW (V, M), the latter in fp32 or wider, filled chunk by chunk."""

    def __init__(self, x: torch.Tensor, weight: torch.Tensor, needed: Sequence[bool]) -> None:
        self.x, self.weight = x, weight
        self.dx = torch.empty_like(x) if needed[0] else None
        self.dw = torch.zeros_like(weight, dtype=statistics_type(weight)) if needed[1] else None

    def add(
        self,
        rows: slice,
        logits: torch.Tensor,
        targets: torch.Tensor,
        lse: torch.Tensor,
        scale: float | torch.Tensor,
        settings: _Settings,
    ) -> None:
        """Turn the logits of a chunk into their gradients, in place, and add what follows from them."""
        ce_grad(
            logits, targets, lse, scale, settings.vocab_start, z_loss=settings.z_loss, out=logits, impl=settings.halves
        )
        if self.dx is not None:
            torch.mm(logits, self.weight, out=self.dx[rows])
        if self.dw is None:
            return
        if self.dw.dtype == logits.dtype:
            self.dw.addmm_(logits.t(), self.x[rows])
        elif logits.is_cuda:
            torch.addmm(self.dw, logits.t(), self.x[rows], out_dtype=self.dw.dtype, out=self.dw)
        else:  # the CPU has no product of 16-bit tensors with a wide result
            self.dw.addmm_(logits.t().to(self.dw.dtype), self.x[rows].to(self.dw.dtype))

    def finish(self, factor: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """dx and dW times `factor`, in the types of x and weight."""
        for gradient in (self.dx, self.dw):
            if gradient is not None and factor is not None:
                gradient.mul_(factor)
        return self.dx, None if self.dw is None else self.dw.to(self.weight.dtype)


register("linear_cross_entropy", "torch")(partial(_chunked, "reference"))
register("linear_cross_entropy", "cpp", cpp_supports, missing=CPP_MISSING)(partial(_chunked, "cpp"))
register("linear_cross_entropy", "triton", triton_supports, missing=TRITON_MISSING)(partial(_chunked, "triton"))
