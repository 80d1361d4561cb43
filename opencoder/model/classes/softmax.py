"""Cross entropy over classes that are split over ranks, of features that are split over them too.

N classes, m of them scored on this rank; D width; b samples of this rank, B of all ranks whose features are gathered. The logits
of a rank exist once, as (m, B), chunk by chunk of rows: a chunk is made, shifted by its own maxima and raised to exp while it
is in the cache, and in the backward pass turned into its gradient at the same place. What each rank sends: its features and the
gradients of all of them (reduce-scatter), and two all-reduces of B and 2B numbers (3B with label smoothing)."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from opencoder.parallel.cross_entropy import IGNORE
from opencoder.parallel.group import SINGLE, Group

from .scored import RowGradient, ScoredRows, Scratch, wide
from .variants import Variant

NOTHING = -1e30
"""Added to a logit to take its class out: not −∞, of which a chunk without any class would make NaN."""


@dataclass(frozen=True)
class Groups:
    """Whom a rank shares what with. All axes of the mesh: pp is 1."""

    classes: Group = SINGLE
    """Ranks among which the classes are split."""
    samples: Group = SINGLE
    """Those of `classes` that have samples of their own."""
    copies: Group = SINGLE
    """Those of `classes` that have the same samples as this one: the gradient of its features is summed over them."""


@dataclass(frozen=True, eq=False)
class Scoring:
    """How features become losses."""

    rows: ScoredRows
    groups: Groups
    variant: Variant
    label_smoothing: float = 0.0
    """Spread over the scored classes of all ranks."""
    feature_grad_scale: float = 1.0
    """Times the gradient of the features (sheet 1.4): the number of ranks, where losses are divided by the samples of all of
    them and the gradients of the backbone are averaged."""


class Terms(NamedTuple):
    """What the logits (m, B) of this rank come down to, each (B,)."""

    highest: torch.Tensor
    sum_exp: torch.Tensor
    """Of logits less `highest`."""
    target: torch.Tensor
    """Logit of the target, 0 on a rank without it."""
    total: torch.Tensor
    """Sum of all logits; zeros unless labels are smoothed."""


class _Targets:
    """The targets within a chunk [begin, end) of places: one entry, or none, in each column."""

    def __init__(self, places: torch.Tensor, begin: int, end: int) -> None:
        self.inside = (places >= begin) & (places < end)
        self.index = (places - begin).clamp(0, end - begin - 1)[None]

    def read(self, z: torch.Tensor) -> torch.Tensor:
        """(B,) of the chunk z (c, B); of no meaning where the column has none."""
        return z.gather(0, self.index)[0]

    def write(self, z: torch.Tensor, values: torch.Tensor) -> None:
        """Put `values` (B,) where the columns have a target."""
        z.scatter_(0, self.index, torch.where(self.inside, values, self.read(z))[None])


@dataclass(eq=False)
class _Saved:
    """Between forward and backward."""

    features: torch.Tensor
    """(B, D)."""
    places: torch.Tensor
    """(B,), −1 where the target is not among this rank's scored rows."""
    valid: torch.Tensor
    logits: torch.Tensor
    """(m·B,): exp(logit − maximum of its chunk)."""
    maxima: torch.Tensor
    """(chunks, B)."""
    lse: torch.Tensor | None = None
    slopes: torch.Tensor | None = None
    """(B,), of the margin."""

    def __post_init__(self) -> None:
        # On the CPU it costs nothing to know which chunks have targets; most have none.
        self._sorted = sorted(self.places.tolist()) if self.places.device.type == "cpu" else None

    def targets(self, begin: int, end: int) -> _Targets | None:
        """Those within the chunk; None if there are none."""
        if self._sorted is not None and bisect_left(self._sorted, begin) == bisect_left(self._sorted, end):
            return None
        return _Targets(self.places, begin, end)


def sharded_softmax(
    features: torch.Tensor,
    labels: torch.Tensor,
    places: torch.Tensor,
    scoring: Scoring,
    gradient: RowGradient | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the losses of this rank's samples, 0-dim, differentiable once, in `features`; and each of them (b,), 0 where the
    label is −100, without gradient.

    features (b, D): those of the variants with cosines have length 1 already. labels (B,), gathered; places (B,): as
    ScoredRows.places gives them. Every valid sample's target must be scored on one rank. The backward pass adds the gradient of
    the scored rows to `gradient`; None: without gradients, and no more logits than a chunk exist. All ranks of the groups must
    call it, with one b, and multiply their sums by the same factor (1 / valid samples of all ranks): that of the own sum is
    taken for all samples."""
    if gradient is None:
        with torch.no_grad():
            losses, _ = _forward(features, labels, places, scoring, None)
        return losses.sum(), losses
    # The weight is an argument for its need of a gradient alone: features may be data.
    total, losses = _ShardedSoftmax.apply(features, scoring.rows.weight, labels, places, scoring, gradient)
    return total, losses


def _forward(
    features: torch.Tensor, labels: torch.Tensor, places: torch.Tensor, scoring: Scoring, scratch: Scratch | None
) -> tuple[torch.Tensor, _Saved]:
    gathered = scoring.groups.samples.all_gather(features.detach())
    saved = _opened(gathered, labels, places, scoring, scratch)
    terms = local_terms(saved, scoring, keep=scratch is not None)
    saved.lse, losses = combined(terms, scoring)
    losses = losses.masked_fill(~saved.valid, 0)
    b, rank = features.shape[0], scoring.groups.samples.rank
    return losses[rank * b : (rank + 1) * b], saved


def _opened(
    features: torch.Tensor, labels: torch.Tensor, places: torch.Tensor, scoring: Scoring, scratch: Scratch | None
) -> _Saved:
    """Room for the logits of `features` (B, D): for all of them out of `scratch`, or without it for one chunk."""
    dtype = product_type(features)
    x, rows, samples = features.to(dtype), scoring.rows, features.shape[0]
    if scratch is None:
        begin, end = next(rows.chunks(samples))
        logits = torch.empty((end - begin) * samples, dtype=wide(dtype), device=x.device)
    else:
        logits = scratch.take("logits", rows.count * samples, x, wide(dtype))
    maxima = logits.new_empty(sum(1 for _ in rows.chunks(samples)), samples)
    return _Saved(x, places, labels != IGNORE, logits, maxima)


@torch.no_grad()
def missing_mass(features: torch.Tensor, labels: torch.Tensor, local: torch.Tensor, scoring: Scoring) -> torch.Tensor:
    """eps (B,) of the sheet's 2.7: softmax mass of each sample, over all classes, on those that are not scored.

    features (B, D), labels (B,), equal on all ranks of the class group; local (B,): the labels less this rank's first class. What
    is scored is `scoring.rows`, whose offsets do not count, nor does smoothing. A loss over the scored classes is too small by
    −log(1 − eps)."""
    scored = replace(scoring.rows, offsets=None)
    rest = replace(scored, ids=None)
    if scored.ids is not None:
        rest = replace(
            rest, offsets=features.new_zeros(rest.count, dtype=torch.float32).index_fill_(0, scored.ids, NOTHING)
        )
    logsums = []
    for rows in (scored, rest) if scored.ids is not None else ():
        part = replace(scoring, rows=rows, label_smoothing=0.0)
        saved = _opened(features, labels, rows.places(local), part, None)
        logsums.append(combined(local_terms(saved, part, keep=False), part)[0])
    if not logsums:
        return features.new_zeros(features.shape[0], dtype=wide(features.dtype))
    inside, outside = logsums
    return torch.sigmoid(outside - inside)


def local_terms(saved: _Saved, scoring: Scoring, *, keep: bool) -> Terms:
    """Fill `saved.logits` and `saved.maxima`, chunk by chunk; without `keep` each chunk is written over the one before."""
    rows, variant, x = scoring.rows, scoring.variant, saved.features
    samples = x.shape[0]
    sums = torch.empty_like(saved.maxima)
    target, total = saved.maxima.new_zeros(samples), saved.maxima.new_zeros(samples)
    target_slopes = torch.ones_like(target)
    for i, (begin, end) in enumerate(rows.chunks(samples)):
        first = begin if keep else 0
        z = saved.logits[first * samples : (first + end - begin) * samples].view(end - begin, samples)
        products(rows.rows(begin, end, x.dtype), x, variant.factor, z)
        at = saved.targets(begin, end)
        if variant.changes_targets and at is not None:
            margined, slopes = variant.margined(at.read(z) / variant.scale)
            at.write(z, margined * variant.scale)
            target_slopes = torch.where(at.inside, slopes, target_slopes)
        if rows.offsets is not None:
            z.add_(rows.offsets[begin:end, None])
        if at is not None:
            target = torch.where(at.inside, at.read(z), target)
        if scoring.label_smoothing:
            total += z.sum(0)
        torch.amax(z, 0, out=saved.maxima[i])
        z.sub_(saved.maxima[i]).exp_()
        torch.sum(z, 0, out=sums[i])
    saved.slopes = target_slopes if variant.changes_targets else None
    highest = saved.maxima.amax(0)
    sum_exp = (sums * (saved.maxima - highest).exp()).sum(0)
    return Terms(highest, sum_exp, target, total)


def combined(terms: Terms, scoring: Scoring) -> tuple[torch.Tensor, torch.Tensor]:
    """Terms of all ranks' logits → log-sum-exp and losses, both (B,) and equal on all ranks, in two all-reduces."""
    group = scoring.groups.classes
    highest, smoothing = terms.highest, scoring.label_smoothing
    if group.size > 1:
        highest = group.all_reduce(terms.highest.clone(), "max")
        parts = [terms.sum_exp * (terms.highest - highest).exp(), terms.target]
        packed = group.all_reduce(torch.stack([*parts, terms.total] if smoothing else parts))
        terms = Terms(highest, packed[0], packed[1], packed[2] if smoothing else terms.total)
    lse = highest + terms.sum_exp.log()
    losses = lse - terms.target
    if smoothing:
        losses = (1 - smoothing) * losses + smoothing * (lse - terms.total / scoring.rows.total_count)
    return lse, losses


def product_type(features: torch.Tensor) -> torch.dtype:
    """Type that rows and features are multiplied in: on the CPU 16-bit products would be rounded to 16 bits."""
    return wide(features.dtype) if features.device.type == "cpu" else features.dtype


def products(rows: torch.Tensor, x: torch.Tensor, factor: float, out: torch.Tensor) -> None:
    """out (c, B) = factor · rows (c, D) · xᵀ, summed up in the type of `out`."""
    if rows.dtype == out.dtype:
        torch.addmm(out, rows, x.t(), beta=0, alpha=factor, out=out)
    else:
        torch.mm(rows, x.t(), out_dtype=out.dtype, out=out)
        if factor != 1:
            out.mul_(factor)


class _ShardedSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        places: torch.Tensor,
        scoring: Scoring,
        gradient: RowGradient,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        losses, ctx.saved = _forward(features, labels, places, scoring, gradient.scratch)
        ctx.scoring, ctx.gradient = scoring, gradient
        ctx.dtype, ctx.needs_features = features.dtype, ctx.needs_input_grad[0]
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        saved, scoring = ctx.saved, ctx.scoring
        if saved is None:
            raise RuntimeError("sharded_softmax can be differentiated once: its logits became their gradient")
        ctx.saved = None
        dx = _backward(saved, scoring, ctx.gradient, grad)
        ctx.gradient.scratch.give_back("logits", saved.logits)
        return (_to_owners(dx, scoring, ctx.dtype) if ctx.needs_features else None), None, None, None, None, None


def _backward(saved: _Saved, scoring: Scoring, gradient: RowGradient, upstream: torch.Tensor) -> torch.Tensor:
    """Adds to the gradient of the rows; returns this rank's part of that of all features, (B, D)."""
    rows, x, variant, smoothing = scoring.rows, saved.features, scoring.variant, scoring.label_smoothing
    samples = x.shape[0]
    values, holds_some = gradient.opened()
    each = saved.valid * upstream.to(saved.maxima.dtype)
    narrow = x.dtype != values.dtype  # 16-bit products: the small factor comes after them
    factor = saved.valid.to(each.dtype) if narrow else each
    assert saved.lse is not None
    scales = (saved.maxima - saved.lse).exp() * factor
    dx = torch.zeros(x.shape, dtype=values.dtype, device=x.device)
    for i, (begin, end) in enumerate(rows.chunks(samples)):
        g = saved.logits[begin * samples : end * samples].view(end - begin, samples)
        g.mul_(scales[i])
        if smoothing:
            g.sub_(factor * (smoothing / rows.total_count))
        at = saved.targets(begin, end)
        if at is not None:
            own = at.read(g) - (1 - smoothing) * factor
            at.write(g, own if saved.slopes is None else own * saved.slopes)
        part = values[begin:end]
        w = rows.rows(begin, end, x.dtype)
        if narrow:
            g = g.to(x.dtype)
            made = torch.mm(g, x, out_dtype=part.dtype).mul_(upstream * variant.factor)
            part.add_(made) if holds_some else part.copy_(made)
            dx.add_(torch.mm(g.t(), w, out_dtype=dx.dtype))
        else:
            torch.addmm(part, g, x, beta=1 if holds_some else 0, alpha=variant.factor, out=part)
            dx.addmm_(g.t(), w, alpha=variant.factor)
    return dx.mul_(upstream * variant.factor) if narrow else dx


def _to_owners(dx: torch.Tensor, scoring: Scoring, dtype: torch.dtype) -> torch.Tensor:
    """(B, D), a part of each rank → (b, D), the sum for this rank's samples. Sent in the type of the features."""
    mine = scoring.groups.samples.reduce_scatter(dx.to(dtype))
    mine = scoring.groups.copies.all_reduce(mine)
    return mine if scoring.feature_grad_scale == 1 else mine * scoring.feature_grad_scale
