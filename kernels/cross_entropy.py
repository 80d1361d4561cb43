"""The public functions `cross_entropy`, `ce_stats` and `ce_grad` and their registered operators."""

from __future__ import annotations

from typing import Any

import torch

from . import _checks
from ._dispatch import choose, register
from ._library import Ops, TritonModule, call, define, like, register_both, scaled, statistics_type
from .reference import cross_entropy as _reference

_triton = TritonModule("cross_entropy")

IGNORE = _reference.IGNORE


def cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int = IGNORE,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    impl: str = "auto",
) -> torch.Tensor:
    """Cross entropy of logits (T, V) with targets (T,), in fp32 or wider.

    `reduction` "mean" is over targets that are not ignored (NaN if all are), "sum", or "none" (T,), 0 where ignored.
    `z_loss` adds z · lse² (arXiv:2204.02311, section 5); `softcap` c caps logits to c · tanh(x / c)."""
    _checks.floating("cross_entropy", logits=logits)
    _checks.targets("cross_entropy", logits, targets)
    _checks.loss_options("cross_entropy", reduction, z_loss, label_smoothing, softcap)
    _checks.target_range("cross_entropy", targets, logits.shape[1], ignore_index)
    options = {
        "ignore_index": ignore_index,
        "z_loss": z_loss,
        "label_smoothing": label_smoothing,
        "softcap": softcap,
        "reduction": reduction,
    }
    chosen = choose("cross_entropy", impl, logits.device, logits, targets, **options)
    loss: torch.Tensor = chosen.run(logits, targets, **options)
    return loss


def ce_stats(
    logits: torch.Tensor,
    targets: torch.Tensor,
    vocab_start: int = 0,
    *,
    softcap: float | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The forward half of a vocabulary-parallel cross entropy; the collective between the halves is the caller's.

    logits (T, V/tp) are the columns from `vocab_start` on; targets (T,) are global ids. Returns (max, sumexp,
    target_logit), each (T,), fp32 or wider: lse = max + log(sumexp); target_logit is 0 where the target is in another
    shard or ignored. `softcap` c caps the logits to c · tanh(x / c) first. No gradient."""
    _checks.floating("ce_stats", logits=logits)
    _checks.targets("ce_stats", logits, targets)
    _checks.positive_cap("ce_stats", softcap)
    _checks.at_least("ce_stats", 0, vocab_start=vocab_start)
    with torch.no_grad():
        chosen = choose("ce_stats", impl, logits.device, logits, targets, vocab_start, softcap=softcap)
        stats: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = chosen.run(
            logits, targets, vocab_start, softcap=softcap
        )
    return stats


def ce_grad(
    logits: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    scale: float | torch.Tensor,
    vocab_start: int = 0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    out: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """The backward half: scale · ((1 + 2·z_loss·lse) · softmax − onehot) for the columns from `vocab_start` on, (T, V/tp).

    `lse` (T,) over the whole vocabulary (capped, with a `softcap`), `scale` a number or (T,); rows whose target is −100
    are 0. `out` receives the result and may be `logits` itself (no second buffer)."""
    _checks.floating("ce_grad", logits=logits, lse=lse)
    _checks.targets("ce_grad", logits, targets)
    _checks.positive_cap("ce_grad", softcap)
    _checks.at_least("ce_grad", 0, vocab_start=vocab_start, z_loss=z_loss)
    rows = logits.shape[:1]
    if lse.shape != rows:
        raise ValueError(f"ce_grad: lse must be ({rows[0]},), got {tuple(lse.shape)}")
    if isinstance(scale, torch.Tensor) and scale.shape not in ((), rows):
        raise ValueError(f"ce_grad: scale must be a number or ({rows[0]},), got {tuple(scale.shape)}")
    if isinstance(scale, torch.Tensor):
        _checks.one_device("ce_grad", logits=logits, scale=scale)
    if out is not None and (out.shape != logits.shape or out.dtype != logits.dtype):
        raise ValueError(
            f"ce_grad: out is {out.dtype} {tuple(out.shape)}; it must be like logits {tuple(logits.shape)}"
        )
    with torch.no_grad():
        wide = statistics_type(logits)
        each = (scale.to(wide) if isinstance(scale, torch.Tensor) else logits.new_full((), scale, dtype=wide)).expand(
            rows
        )
        arguments = (logits, targets, lse, each, vocab_start)
        options: dict[str, Any] = {"z_loss": z_loss, "softcap": softcap, "out": out}
        grad: torch.Tensor = choose("ce_grad", impl, logits.device, *arguments, **options).run(*arguments, **options)
    return grad


def _cross_entropy(
    ops: Ops,
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int,
    z_loss: float,
    label_smoothing: float,
    softcap: float | None,
    reduction: str,
) -> torch.Tensor:
    options = (ignore_index, z_loss, label_smoothing, softcap)
    if reduction != "none" and logits.device.type == "cpu" and torch.is_grad_enabled() and logits.requires_grad:
        # The upstream gradient is one number: the gradient is made while each row is in cache and multiplied afterwards.
        # On a GPU a row is not in cache the second time, and keeping the gradient until backward would cost memory only.
        scale = torch.ones((), dtype=statistics_type(logits))
        if reduction == "mean":
            scale = scale / (targets != ignore_index).sum()
        total: torch.Tensor = call(ops, "ce_with_gradient", logits, targets, scale, *options)[0]
        return total
    loss: torch.Tensor = call(ops, "ce_forward", logits, targets, *options)[0]
    return _reference.reduced(loss, targets != ignore_index, reduction)


def _ce_stats(
    ops: Ops, logits: torch.Tensor, targets: torch.Tensor, vocab_start: int = 0, *, softcap: float | None = None
) -> Any:
    return ops.ce_stats(logits, targets, vocab_start, softcap)


def _ce_grad(
    ops: Ops,
    logits: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    scale: torch.Tensor,
    vocab_start: int = 0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    out: torch.Tensor | None = None,
) -> Any:
    arguments = (scale, logits, targets, lse, vocab_start, IGNORE, z_loss, 0.0, softcap)
    if out is None:
        return ops.ce_backward(*arguments)
    if not out.is_contiguous():
        return out.copy_(ops.ce_backward(*arguments))
    if out is logits:
        ops.ce_backward_(*arguments)
    else:
        ops.ce_backward_out(*arguments, out)
    return out


register("cross_entropy", "reference")(_reference.cross_entropy)
register("ce_stats", "reference")(_reference.ce_stats)
register("ce_grad", "reference")(_reference.ce_grad)
register_both("cross_entropy", _cross_entropy)
register_both("ce_stats", _ce_stats)
register_both("ce_grad", _ce_grad)


# ---- the operators ----


def _statistics(logits: torch.Tensor, number: int) -> Any:
    return tuple(logits.new_empty(logits.shape[:1], dtype=statistics_type(logits)) for _ in range(number))


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    logits, targets, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, targets, output[1])


def _backward(ops: Ops, ctx: Any, dloss: torch.Tensor, dlse: Any) -> Any:
    logits, targets, lse = ctx.saved_tensors
    ignore_index, *rest = ctx.options
    return ops.ce_backward(dloss, logits, targets, lse, 0, ignore_index, *rest), None, None, None, None, None


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or zeros of the logits' size would be made up for the gradient's gradient
    ctx.save_for_backward(inputs[0], output[1])


def _scale_kept(ops: Ops, ctx: Any, dtotal: torch.Tensor, dgrad: Any) -> Any:
    logits, grad = ctx.saved_tensors
    return scaled(grad, dtotal, logits), *(None,) * 6


def _triton_with_gradient(
    logits: torch.Tensor, targets: torch.Tensor, scale: torch.Tensor, *options: Any, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    loss, lse = _triton.ce_forward(logits, targets, *options)
    return loss, _triton.ce_backward(scale.expand(loss.shape), logits, targets, lse, 0, *options, out=out)


def _triton_total_with_gradient(logits: Any, targets: Any, scale: Any, *options: Any) -> Any:
    loss, grad = _triton_with_gradient(logits, targets, scale, *options)
    return loss.sum() * scale.to(loss.dtype), grad


_OPTIONS = "int ignore_index, float z_loss, float label_smoothing, float? softcap"
_FROM = f"Tensor targets, Tensor lse, int vocab_start, {_OPTIONS}"
define(
    f"ce_forward(Tensor logits, Tensor targets, {_OPTIONS}) -> (Tensor loss, Tensor lse)",
    fake=lambda logits, *rest: _statistics(logits, 2),
    triton=_triton.ce_forward,
    setup=_save,
    backward=_backward,
)
define(
    "ce_stats(Tensor logits, Tensor targets, int vocab_start, float? softcap) -> (Tensor, Tensor, Tensor)",
    fake=lambda logits, *rest: _statistics(logits, 3),
    triton=_triton.ce_stats,
)
define(
    f"ce_with_gradient(Tensor logits, Tensor targets, Tensor scale, {_OPTIONS}) -> (Tensor total, Tensor grad)",
    fake=lambda logits, *rest: (logits.new_empty((), dtype=statistics_type(logits)), like(logits)),
    triton=_triton_total_with_gradient,
    setup=_keep,
    backward=_scale_kept,
)
define(
    f"ce_with_gradient_(Tensor(a!) logits, Tensor targets, Tensor scale, {_OPTIONS}) -> Tensor loss",
    fake=lambda logits, *rest: _statistics(logits, 1)[0],
    triton=(lambda logits, *rest: _triton_with_gradient(logits, *rest, out=logits)[0]),
)
define(
    f"ce_backward(Tensor dloss, Tensor logits, {_FROM}) -> Tensor",
    fake=lambda dloss, logits, *rest: like(logits),
    triton=(lambda dloss, logits, *rest: _triton.ce_backward(dloss, logits, *rest, out=None)),
    refuse_backward=True,
)


def _in_place(dloss: torch.Tensor, logits: torch.Tensor, *rest: Any) -> None:
    _triton.ce_backward(dloss, logits, *rest, out=logits)


def _into(dloss: torch.Tensor, logits: torch.Tensor, *rest: Any) -> None:
    _triton.ce_backward(dloss, logits, *rest[:-1], out=rest[-1])


define(
    f"ce_backward_(Tensor dloss, Tensor(a!) logits, {_FROM}) -> ()",
    fake=lambda *arguments: None,
    triton=_in_place,
)
define(
    f"ce_backward_out(Tensor dloss, Tensor logits, {_FROM}, Tensor(a!) out) -> ()",
    fake=lambda *arguments: None,
    triton=_into,
)
