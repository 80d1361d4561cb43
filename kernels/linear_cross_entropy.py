"""The public function `linear_cross_entropy`: cross entropy of x · weightᵀ without the logits ever being whole.

Tokens go through in chunks: one product for the logits, the loss and its gradient in place over them, two products for
the gradients of x and weight. Three products of 2·T·M·V each, as in the plain computation, and the logits of one chunk
instead of all; methods that recompute the logits need four. The gradients are worked out in the forward pass while the
logits are at hand and scaled in the backward pass. dW is summed in fp32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from . import _checks
from ._dispatch import choose, register
from ._library import (
    CPP_MISSING,
    TRITON_MISSING,
    call,
    cpp_supports,
    define,
    ops_of,
    scaled,
    statistics_type,
    triton_supports,
)
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
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    vocab_start: int = 0,
    combine: Combine | None = None,
    chunk_tokens: int | None = None,
    return_token_losses: bool = False,
    impl: str = "auto",
) -> Any:
    """Cross entropy of logits = x (T, M) · weight (V, M)ᵀ with targets (T,); options as `cross_entropy`.

    Vocabulary-parallel: `weight` holds the rows from `vocab_start` on and `combine` turns a chunk's statistics into those
    of the whole vocabulary (the collective is the caller's); the gradient of x is then this shard's part of the sum, and
    label smoothing is not offered. `reduction="none"` recomputes the logits in the backward pass, as the upstream
    gradients are not known before. `chunk_tokens` rows of logits exist at a time (default: about 96 MB of them).

    Returns the loss; with `return_token_losses` (loss, what was reduced to it: (T,) in fp32 or wider, 0 where ignored,
    without gradients), at no further product."""
    _checks.floating("linear_cross_entropy", x=x, weight=weight)
    _checks.same_dtype("linear_cross_entropy", x=x, weight=weight)
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"linear_cross_entropy: x must be (T, M) and weight (V, M), got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if 0 in (weight.shape[0], x.shape[1]):
        raise ValueError(f"linear_cross_entropy: weight is {tuple(weight.shape)}; V and M must be at least 1")
    _checks.targets("linear_cross_entropy", x, targets)
    _checks.loss_options("linear_cross_entropy", reduction, z_loss, label_smoothing, softcap)
    _checks.at_least("linear_cross_entropy", 0, vocab_start=vocab_start)
    if combine is None:
        _checks.target_range("linear_cross_entropy", targets, weight.shape[0], ignore_index)
    elif label_smoothing:
        raise ValueError(
            f"linear_cross_entropy: label_smoothing={label_smoothing} with `combine`; a shard of the vocabulary does not "
            "know the mean of all logits: leave it 0"
        )
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"linear_cross_entropy: chunk_tokens={chunk_tokens}; it must be positive")
    if ignore_index != IGNORE:  # the halves know one mark only
        targets = targets.masked_fill(targets == ignore_index, IGNORE)
    chunk = chunk_tokens or max(1, CHUNK_BYTES // max(1, weight.shape[0] * weight.element_size()))
    options: dict[str, Any] = {"reduction": reduction, "combine": combine}
    options["settings"] = _Settings(chunk, z_loss, label_smoothing, softcap, vocab_start)
    chosen = choose("linear_cross_entropy", impl, x.device, x, weight, targets, **options)
    loss, token_losses = chosen.run(x, weight, targets, **options)
    return (loss, token_losses.detach()) if return_token_losses else loss


class _Settings(NamedTuple):
    """The numbers of a call."""

    chunk_tokens: int
    z_loss: float
    label_smoothing: float
    softcap: float | None
    vocab_start: int = 0


def _reference_supports(*args: Any, combine: Combine | None = None, **options: Any) -> str | None:
    return None if combine is None else "the reference knows whole vocabularies only"


@register("linear_cross_entropy", "reference", _reference_supports)
def _run_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    reduction: str,
    settings: _Settings,
    combine: None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    wide, (_, z_loss, smoothing, softcap, _) = statistics_type(x), settings
    logits = x.to(wide) @ weight.to(wide).t()
    options: dict[str, Any] = {"z_loss": z_loss, "label_smoothing": smoothing, "softcap": softcap}
    token_losses = _reference.cross_entropy(logits, targets, reduction="none", **options)
    return _reference.reduced(token_losses, targets != IGNORE, reduction), token_losses


def _chunked(
    halves: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    reduction: str,
    settings: _Settings,
    combine: Combine | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, token losses). `halves` names the implementation of the loss and its gradient over a chunk of logits."""
    if combine is not None:
        loss, token_losses = _Parallel.apply(x, weight, targets, halves, settings, combine, reduction != "none")
        return _shared_out(loss, targets, reduction), token_losses
    ops = ops_of(x) if halves == "triton" else torch.ops.opencoder
    needed = torch.is_grad_enabled() and x.requires_grad, torch.is_grad_enabled() and weight.requires_grad
    if reduction == "none" or not any(needed):
        loss = token_losses = call(ops, "linear_ce", x, weight, targets, halves, *settings[:4])[0]
    else:
        found = call(ops, "linear_ce_with_gradients", x, weight, targets, halves, *settings[:4], *needed)
        loss, token_losses = found[0], found[3]
    return _shared_out(loss, targets, reduction), token_losses


def _shared_out(loss: torch.Tensor, targets: torch.Tensor, reduction: str) -> torch.Tensor:
    """Token losses, or their sum already, to what `reduction` asks for."""
    return loss if reduction == "none" else _reference.reduced(loss, targets != IGNORE, reduction)


register("linear_cross_entropy", "torch")(partial(_chunked, "reference"))
register("linear_cross_entropy", "cpp", cpp_supports, missing=lambda: CPP_MISSING)(partial(_chunked, "cpp"))
register("linear_cross_entropy", "triton", triton_supports, missing=lambda: TRITON_MISSING)(partial(_chunked, "triton"))


# ---- chunks ----


def _chunks(x: torch.Tensor, weight: torch.Tensor, chunk_tokens: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows and their logits (chunk, V), in one buffer that may be written to and is overwritten by the next."""
    tokens = x.shape[0]
    buffer = x.new_empty(min(chunk_tokens, tokens), weight.shape[0])
    for start in range(0, tokens, chunk_tokens):
        rows = slice(start, min(start + chunk_tokens, tokens))
        yield rows, torch.mm(x[rows], weight.t(), out=buffer[: rows.stop - rows.start])


class _Halves(NamedTuple):
    """Loss of a chunk of logits, and its gradient over them."""

    name: str
    settings: _Settings
    combine: Combine | None = None

    def loss_with_gradient_(self, logits: torch.Tensor, targets: torch.Tensor, one: torch.Tensor) -> torch.Tensor:
        """Token losses; the logits become the gradient of their sum. `one` is a 0-dim 1."""
        _, z_loss, smoothing, softcap, _ = self.settings
        if self.combine is None and self.name != "reference":
            losses: torch.Tensor = self._ops(logits).ce_with_gradient_(
                logits, targets, one, IGNORE, z_loss, smoothing, softcap
            )
            return losses
        losses, lse = self.loss_and_lse(logits, targets)
        self.gradient_(logits, targets, lse, one.expand(logits.shape[:1]))
        return losses

    def loss_and_lse(self, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Token losses, 0 where ignored, and log-sum-exps."""
        _, z_loss, smoothing, softcap, vocab_start = self.settings
        if self.combine is not None:
            lse, target_logit = self.combine(*ce_stats(logits, targets, vocab_start, softcap=softcap, impl=self.name))
            loss = lse - target_logit + z_loss * lse**2
            return loss.masked_fill(targets == IGNORE, 0), lse
        options = (logits, targets, IGNORE, z_loss, smoothing, softcap)
        if self.name == "reference":
            return _reference.loss_and_lse(*options)
        found: tuple[torch.Tensor, torch.Tensor] = self._ops(logits).ce_forward(*options)
        return found

    def gradient_(self, logits: torch.Tensor, targets: torch.Tensor, lse: torch.Tensor, scale: torch.Tensor) -> None:
        """Overwrite the logits with scale (T,) times the gradient of their token's loss."""
        _, z_loss, smoothing, softcap, vocab_start = self.settings
        if self.combine is not None:
            options: dict[str, Any] = {"z_loss": z_loss, "softcap": softcap, "out": logits, "impl": self.name}
            ce_grad(logits, targets, lse, scale, vocab_start, **options)
        elif self.name == "reference":
            options = {"z_loss": z_loss, "label_smoothing": smoothing, "softcap": softcap, "out": logits}
            _reference.ce_grad(logits, targets, lse, scale, 0, **options)
        else:
            self._ops(logits).ce_backward_(scale, logits, targets, lse, 0, IGNORE, z_loss, smoothing, softcap)

    def _ops(self, logits: torch.Tensor) -> Any:
        return ops_of(logits) if self.name == "triton" else torch.ops.opencoder


def _losses(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, halves: _Halves
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token losses and log-sum-exps, each (T,)."""
    loss, lse = (x.new_empty(x.shape[0], dtype=statistics_type(x)) for _ in range(2))
    for rows, logits in _chunks(x, weight, halves.settings.chunk_tokens):
        loss[rows], lse[rows] = halves.loss_and_lse(logits, targets[rows])
    return loss, lse


class _Gradients:
    """dx (T, M) in its type and dW (V, M) in fp32 or wider, filled chunk by chunk; None where not needed."""

    def __init__(self, x: torch.Tensor, weight: torch.Tensor, need_x: bool, need_weight: bool) -> None:
        self.x, self.weight = x, weight
        self.dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else None
        wide = statistics_type(weight)
        self.dw = torch.zeros(weight.shape, dtype=wide, device=weight.device) if need_weight else None

    def add(self, rows: slice, dlogits: torch.Tensor) -> None:
        """What follows from the gradients of a chunk's logits."""
        if self.dx is not None:
            torch.mm(dlogits, self.weight, out=self.dx[rows])
        if self.dw is None:
            return
        if self.dw.dtype == dlogits.dtype:
            self.dw.addmm_(dlogits.t(), self.x[rows])
        elif dlogits.is_cuda:
            torch.addmm(self.dw, dlogits.t(), self.x[rows], out_dtype=self.dw.dtype, out=self.dw)
        else:  # the CPU has no product of 16-bit tensors with a wide result
            self.dw.addmm_(dlogits.t().to(self.dw.dtype), self.x[rows].to(self.dw.dtype))


def _sweep(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, halves: _Halves, need_x: bool, need_weight: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Token losses, and the gradients of their sum."""
    loss = x.new_empty(x.shape[0], dtype=statistics_type(x))
    one = loss.new_ones(())
    gradients = _Gradients(x, weight, need_x, need_weight)
    for rows, logits in _chunks(x, weight, halves.settings.chunk_tokens):
        loss[rows] = halves.loss_with_gradient_(logits, targets[rows], one)
        gradients.add(rows, logits)
    return loss, gradients.dx, gradients.dw


def _recompute(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    dloss: torch.Tensor,
    halves: _Halves,
    need_x: bool,
    need_weight: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of token losses under upstream gradients (T,)."""
    gradients = _Gradients(x, weight, need_x, need_weight)
    for rows, logits in _chunks(x, weight, halves.settings.chunk_tokens):
        halves.gradient_(logits, targets[rows], lse[rows], dloss[rows])
        gradients.add(rows, logits)
    return gradients.dx, gradients.dw


# ---- a vocabulary over several ranks: a Python function stands between the halves, so this is no operator ----


class _Parallel(torch.autograd.Function):
    """Token losses (T,), or with `at_once` their sum, 0-dim; and the token losses, without gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        name: str,
        settings: _Settings,
        combine: Combine,
        at_once: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.halves, ctx.at_once = _Halves(name, settings, combine), at_once
        need_x, need_weight = ctx.needs_input_grad[:2]
        if at_once and (need_x or need_weight):
            loss, ctx.dx, ctx.dw = _sweep(x, weight, targets, ctx.halves, need_x, need_weight)
            ctx.kind, ctx.used = weight.dtype, False
        else:
            loss, lse = _losses(x, weight, targets, ctx.halves)
            ctx.save_for_backward(x, weight, targets, lse)
        token_losses = loss if at_once else loss.clone()  # not the tensor that has a gradient
        ctx.mark_non_differentiable(token_losses)
        return loss.sum() if at_once else loss, token_losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[Any, ...]:
        rest = (None,) * 5
        if not ctx.at_once:
            x, weight, targets, lse = ctx.saved_tensors
            dx, dw = _recompute(x, weight, targets, lse, grad, ctx.halves, *ctx.needs_input_grad[:2])
            return dx, None if dw is None else dw.to(weight.dtype), *rest
        if ctx.used:
            raise RuntimeError("linear_cross_entropy: its gradients are used up; a second backward is not offered")
        ctx.used = True
        dx, dw = ctx.dx, ctx.dw
        ctx.dx = ctx.dw = None
        dx = None if dx is None else dx.mul_(grad)
        return dx, None if dw is None else dw.mul_(grad).to(ctx.kind), *rest


# ---- the operators ----

_OPTIONS = "str halves, int chunk_tokens, float z_loss, float label_smoothing, float? softcap"
_INPUTS = "Tensor x, Tensor weight, Tensor targets"


def _linear_ce(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, halves: str, *settings: Any) -> Any:
    return _losses(x, weight, targets, _Halves(halves, _Settings(*settings)))


def _linear_ce_backward(
    dloss: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    halves: str,
    *rest: Any,
) -> Any:
    *settings, need_x, need_weight = rest
    found = _recompute(x, weight, targets, lse, dloss, _Halves(halves, _Settings(*settings)), need_x, need_weight)
    return _placeholders(x, weight, *found)


def _linear_ce_with_gradients(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, halves: str, *rest: Any
) -> Any:
    *settings, need_x, need_weight = rest
    loss, dx, dw = _sweep(x, weight, targets, _Halves(halves, _Settings(*settings)), need_x, need_weight)
    return loss.sum(), *_placeholders(x, weight, dx, dw), loss


def _placeholders(
    x: torch.Tensor, weight: torch.Tensor, dx: torch.Tensor | None, dw: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """An operator has no optional results: an empty tensor stands for a gradient that is not needed."""
    return (
        x.new_empty(0) if dx is None else dx,
        weight.new_empty(0, dtype=statistics_type(weight)) if dw is None else dw,
    )


def _fake_gradients(x: torch.Tensor, weight: torch.Tensor, need_x: bool, need_weight: bool) -> Any:
    wide = statistics_type(weight)
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else x.new_empty(0),
        weight.new_empty(weight.shape if need_weight else 0, dtype=wide),
    )


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, targets, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, targets, output[1])


def _backward(ops: Any, ctx: Any, dloss: torch.Tensor, dlse: Any) -> Any:
    x, weight, targets, lse = ctx.saved_tensors
    needed = ctx.needs_input_grad[:2]
    dx, dw = ops.linear_ce_backward(dloss, x, weight, targets, lse, *ctx.options, *needed)
    return dx if needed[0] else None, dw.to(weight.dtype) if needed[1] else None, None, *(None for _ in ctx.options)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, _, *ctx.options = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or zeros of dW's size would be made up
    ctx.save_for_backward(x, weight, *output[1:3])


def _scale_kept(ops: Any, ctx: Any, dloss: torch.Tensor, *others: Any) -> Any:
    x, weight, dx, dw = ctx.saved_tensors
    *_, need_x, need_weight = ctx.options
    dx = scaled(dx, dloss, x) if need_x else None
    dw = scaled(dw, dloss, weight).to(weight.dtype) if need_weight else None
    return dx, dw, None, *(None for _ in ctx.options)


define(
    f"linear_ce({_INPUTS}, {_OPTIONS}) -> (Tensor loss, Tensor lse)",
    fake=lambda x, *rest: tuple(x.new_empty(x.shape[:1], dtype=statistics_type(x)) for _ in range(2)),
    python=_linear_ce,
    setup=_save,
    backward=_backward,
)
define(
    f"linear_ce_backward(Tensor dloss, {_INPUTS}, Tensor lse, {_OPTIONS}, bool need_x, bool need_weight) "
    "-> (Tensor, Tensor)",
    fake=lambda dloss, x, weight, *rest: _fake_gradients(x, weight, *rest[-2:]),
    python=_linear_ce_backward,
    refuse_backward=True,
)
define(
    f"linear_ce_with_gradients({_INPUTS}, {_OPTIONS}, bool need_x, bool need_weight) "
    "-> (Tensor loss, Tensor, Tensor, Tensor token_losses)",
    fake=lambda x, weight, *rest: (
        x.new_empty((), dtype=statistics_type(x)),
        *_fake_gradients(x, weight, *rest[-2:]),
        x.new_empty(x.shape[:1], dtype=statistics_type(x)),
    ),
    python=_linear_ce_with_gradients,
    setup=_keep,
    backward=_scale_kept,
)
