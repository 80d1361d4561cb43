"""Cross entropy of logits (T, V), whole or as the halves of a vocabulary split over ranks."""

from __future__ import annotations

import torch

IGNORE = -100


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int = IGNORE,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """lse − logit of the target, smoothed towards the mean logit, plus z_loss · lse²; 0 where the target is ignored."""
    loss, _ = loss_and_lse(logits, targets, ignore_index, z_loss, label_smoothing, softcap)
    return reduced(loss, targets != ignore_index, reduction)


def loss_and_lse(
    logits: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    z_loss: float,
    label_smoothing: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token losses and log-sum-exps, each (T,); both 0 where the target is ignored."""
    x = logits.to(_wide(logits))
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    valid = targets != ignore_index
    # An ignored row may hold anything: without this its infinities would come back as NaN gradients.
    x = torch.where(valid[:, None], x, 0.0)
    lse = torch.logsumexp(x, -1)
    target = x.gather(-1, targets.long().masked_fill(~valid, 0)[:, None])[:, 0]
    loss = lse - (1 - label_smoothing) * target
    if label_smoothing:
        loss = loss - label_smoothing * x.mean(-1)
    return torch.where(valid, loss + z_loss * lse**2, 0.0), torch.where(valid, lse, 0.0)


def reduced(loss: torch.Tensor, valid: torch.Tensor, reduction: str) -> torch.Tensor:
    """Token losses (T,), 0 where not `valid`, to what `reduction` asks for."""
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / valid.sum()


def ce_stats(
    logits: torch.Tensor, targets: torch.Tensor, vocab_start: int, *, softcap: float | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(T, V/tp) → largest logit, sum of exp(logit − largest), and the target's logit (0 if it is not in this shard)."""
    if softcap is not None:
        logits = softcap * torch.tanh(logits.to(_wide(logits)) / softcap)
    highest, sum_exp = _max_and_sum_exp(logits)
    local = targets.long() - vocab_start
    here = (local >= 0) & (local < logits.shape[1])
    target = logits.gather(1, local.masked_fill(~here, 0)[:, None])[:, 0].to(highest.dtype)
    return highest, sum_exp, target.masked_fill(~here, 0)


def _max_and_sum_exp(logits: torch.Tensor, rows: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """In blocks of rows: the temporary exp stays in cache, and memory of the logits' size is not needed twice."""
    wide = _wide(logits)
    highest = logits.amax(1).to(wide)
    # A row that is −inf throughout (a shard of masked vocabulary) has the sum 0, not exp(−inf − −inf) = nan.
    shift = highest.masked_fill(highest == -torch.inf, 0)
    sum_exp = torch.empty_like(highest)
    for start in range(0, logits.shape[0], rows):
        part = slice(start, start + rows)
        sum_exp[part] = (logits[part].to(wide) - shift[part, None]).exp_().sum(1)
    return highest, sum_exp


def ce_grad(
    logits: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    scale: torch.Tensor,
    vocab_start: int,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    out: torch.Tensor | None = None,
    rows: int = 64,
) -> torch.Tensor:
    """scale · ((1 + 2·z·lse) · softmax − target distribution) for this shard, scale (T,); 0 where the target is −100. With
    a softcap times its slope. Smoothing is for whole vocabularies. `out` may be `logits` itself."""
    wide = _wide(logits)
    out = torch.empty_like(logits) if out is None else out
    valid = targets != IGNORE
    factor = torch.where(valid, scale, 0.0).to(wide)  # (T,)
    whole = factor if not z_loss else factor * (1 + 2 * z_loss * lse)
    local = targets.long() - vocab_start
    here = valid & (local >= 0) & (local < logits.shape[1])
    at_target = -(factor * here) * (1 - label_smoothing)
    for start in range(0, logits.shape[0], rows):
        part = slice(start, start + rows)
        tanh = None if softcap is None else torch.tanh(logits[part].to(wide) / softcap)
        capped = logits[part].to(wide) if softcap is None or tanh is None else softcap * tanh
        block = torch.sub(capped, lse[part, None], out=out[part] if out.dtype == wide else None)
        block.exp_().mul_(whole[part, None])
        if label_smoothing:
            block -= factor[part, None] * (label_smoothing / logits.shape[1])
        block.scatter_add_(1, local[part].masked_fill(~here[part], 0)[:, None], at_target[part, None])
        if tanh is not None:
            block *= 1 - tanh * tanh
        if out.dtype != wide:
            out[part] = block
    # A masked row with infinite logits would give 0 · inf = nan.
    return out.masked_fill_(~valid[:, None], 0)
