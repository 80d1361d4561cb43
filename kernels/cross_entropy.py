"""The public functions `cross_entropy`, `ce_stats` and `ce_grad`."""

from __future__ import annotations

import torch

from . import _checks
from ._dispatch import choose, register
from .reference import cross_entropy as _reference

register("cross_entropy", "reference")(_reference.cross_entropy)
register("ce_stats", "reference")(_reference.ce_stats)
register("ce_grad", "reference")(_reference.ce_grad)


def cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int = -100,
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
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"cross_entropy: reduction={reduction!r}; allowed: mean, sum, none")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"cross_entropy: label_smoothing={label_smoothing}; allowed: [0, 1]")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"cross_entropy: softcap={softcap}; it must be positive, None for no cap")
    if targets.device.type == "cpu" and targets.numel():
        valid = targets[targets != ignore_index]
        if valid.numel() and (valid.min() < 0 or valid.max() >= logits.shape[1]):
            raise ValueError(
                f"cross_entropy: targets lie in [{int(valid.min())}, {int(valid.max())}]; allowed: "
                f"[0, {logits.shape[1]}) and ignore_index={ignore_index}"
            )
    options = {
        "ignore_index": ignore_index,
        "z_loss": z_loss,
        "label_smoothing": label_smoothing,
        "softcap": softcap,
        "reduction": reduction,
    }
    chosen = choose("cross_entropy", impl, logits.device.type, logits, targets, **options)
    loss: torch.Tensor = chosen.run(logits, targets, **options)
    return loss


def ce_stats(
    logits: torch.Tensor, targets: torch.Tensor, vocab_start: int = 0, *, impl: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The forward half of a vocabulary-parallel cross entropy; the collective between the halves is the caller's.

    logits (T, V/tp) are the columns from `vocab_start` on; targets (T,) are global ids. Returns (max, sumexp,
    target_logit), each (T,), fp32 or wider: lse = max + log(sumexp); target_logit is 0 where the target is in another
    shard or ignored. No gradient."""
    _checks.floating("ce_stats", logits=logits)
    _checks.targets("ce_stats", logits, targets)
    with torch.no_grad():
        chosen = choose("ce_stats", impl, logits.device.type, logits, targets, vocab_start)
        stats: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = chosen.run(logits, targets, vocab_start)
    return stats


def ce_grad(
    logits: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    scale: float | torch.Tensor,
    vocab_start: int = 0,
    *,
    out: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """The backward half: scale · (softmax − onehot) for the columns from `vocab_start` on, (T, V/tp).

    `lse` (T,) over the whole vocabulary, `scale` a number or (T,); rows whose target is −100 are 0. `out` receives the
    result and may be `logits` itself (no second buffer)."""
    _checks.floating("ce_grad", logits=logits, lse=lse)
    _checks.targets("ce_grad", logits, targets)
    rows = logits.shape[:1]
    if lse.shape != rows:
        raise ValueError(f"ce_grad: lse must be ({rows[0]},), got {tuple(lse.shape)}")
    if isinstance(scale, torch.Tensor) and scale.shape not in ((), rows):
        raise ValueError(f"ce_grad: scale must be a number or ({rows[0]},), got {tuple(scale.shape)}")
    if out is not None and (out.shape != logits.shape or out.dtype != logits.dtype):
        raise ValueError(
            f"ce_grad: out is {out.dtype} {tuple(out.shape)}; it must be like logits {tuple(logits.shape)}"
        )
    with torch.no_grad():
        chosen = choose("ce_grad", impl, logits.device.type, logits, targets, lse, scale, vocab_start)
        grad: torch.Tensor = chosen.run(logits, targets, lse, scale, vocab_start, out=out)
    return grad
