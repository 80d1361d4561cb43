"""Faults that tests of parallel training must notice, each with the smallest layout of the matrix that has what it breaks.

A fault leaves out or distorts one communication, or one decision that only exists because there are several ranks: what
Megatron-LM's users have met (#7452, #906, #936, #1764, PR#5916), and what this design could get wrong.

Not here: a tied matrix over stages (refused), rows of padding (part of the softmax at any layout, as in one process), and 16-bit
gradients that are not folded (fp64 has none: tests/parallel/test_pipeline.py compares them bit by bit)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from opencoder.model import attend, decoder, heads, initialise
from opencoder.optim import optimizer, sharded
from opencoder.parallel import (
    collectives,
    cross_entropy,
    gradients,
    layers,
    overlap,
    pipeline,
    placement,
    ring,
    ulysses,
)
from opencoder.parallel import sharded as buckets
from opencoder.parallel.group import SINGLE, Group, Handle
from opencoder.train import pipeline_runner, step
from opencoder.train.totals import Totals

from .patches import Patches


class Fault(NamedTuple):
    """Something that is done wrong."""

    layout: str
    """Of CASES."""
    apply: Callable[[Patches], None]


FAULTS: dict[str, Fault] = {}
"""What goes wrong → where it must be noticed."""


def fault(name: str, layout: str) -> Callable[[Callable[[Patches], None]], Callable[[Patches], None]]:
    """Enter a function that installs the fault."""

    def enter(apply: Callable[[Patches], None]) -> Callable[[Patches], None]:
        FAULTS[name] = Fault(layout, apply)
        return apply

    return enter


def silenced(name: str, layout: str, owner: Any, function: str, operation: str = "all_reduce", **how: Any) -> None:
    """Enter the fault that one collective is left out."""
    FAULTS[name] = Fault(layout, lambda patches: patches.silence(owner, function, operation, **how))


# ---- data parallel: gradients, their number, their norm ----

silenced("gradients are not summed over dp", "dp2-documents", optimizer, "reduce_gradients", "start_all_reduce")
silenced("targets are counted by each rank alone", "dp2-documents", heads.VocabHead, "begin_step")
silenced("the loss is not summed over dp", "dp2-documents", step.TrainStep, "_summed")


@fault("gradients are averaged over dp", "dp2-documents")
def _(patches: Patches) -> None:
    def make(reduce: Any) -> Any:
        def averaged(of: Any, mesh: Any) -> None:
            reduce(of, mesh)
            for gradient, _ in of:
                gradient /= mesh.dp.size

        return averaged

    patches.replace(optimizer, "reduce_gradients", make)


@fault("gradients are summed twice", "dp2-documents")
def _(patches: Patches) -> None:
    patches.replace(optimizer, "reduce_gradients", lambda reduce: lambda *a: (reduce(*a), reduce(*a))[0])


@fault("gradients are summed over tp in place of dp", "tp2-dp2-documents")
def _(patches: Patches) -> None:
    patches.replace(gradients, "reduction_groups", lambda _: lambda placed, mesh: (mesh.tp,))


@fault("every micro-batch is divided by its own number of targets", "dp2-documents")
def _(patches: Patches) -> None:
    def make(_: Any) -> Any:
        def mean_of_means(self: Any, micro_batches: Any, count: torch.Tensor, *, groups: int = 0) -> Totals:
            totals, told = Totals(self.device), Totals(self.device)
            for mb in micro_batches:
                mean = self._loss(mb, totals) / (mb.labels != -100).sum() / (2 * len(micro_batches))
                mean.backward()
                told.values[0] += mean.detach() * count
            return told

        return mean_of_means

    patches.replace(step.SequentialRunner, "run", make)


@fault("the evaluation is a mean of means", "dp2-documents")
def _(patches: Patches) -> None:
    def make(evaluate: Any) -> Any:
        return lambda self, batches: torch.stack([evaluate(self, [batch]) for batch in batches]).mean()

    patches.replace(step.TrainStep, "evaluate", make)


@fault("masked targets are counted", "dp2-documents")
def _(patches: Patches) -> None:
    def make(begin: Any) -> Any:
        return lambda self, targets: begin(self, [t.clamp(min=0) for t in targets])

    patches.replace(heads.VocabHead, "begin_step", make)


# ---- tensor parallel ----

silenced("column layers: gradients of the input are not summed", "tp2-no-overlap", collectives._CopyToGroup, "backward")
silenced("the same, beside the weights' gradients", "tp2-tied", overlap._ColumnProducts, "backward", "start_all_reduce")
silenced("row layers: partial results are not summed", "tp2-no-overlap", layers.RowParallelLinear, "forward")
silenced("the embedding is not summed", "tp2-no-overlap", layers.VocabParallelEmbedding, "forward")
silenced("loss: every rank has a maximum of its own", "tp2-no-overlap", cross_entropy, "_combined", op="max")
silenced("loss: sums of exponentials are not summed", "tp2-no-overlap", cross_entropy, "_combined", op="sum")


@fault("row layers: partial results are averaged", "tp2-no-overlap")
def _(patches: Patches) -> None:
    patches.replace(
        collectives._ReduceFromGroup,
        "forward",
        lambda forward: lambda ctx, x, group: forward(ctx, x, group) / group.size,
    )


@fault("loss: every rank takes its rows for the first of the vocabulary", "tp2-no-overlap")
def _(patches: Patches) -> None:
    def make(loss: Any) -> Any:
        return lambda *args, vocab_start, **kwargs: loss(*args, vocab_start=0, **kwargs)

    patches.replace(heads, "vocab_parallel_linear_cross_entropy", make)


@fault("key/value heads: gradients of the copies are not summed", "tp4-kv2")
def _(patches: Patches) -> None:
    def make(place: Any) -> Any:
        return lambda *args, **kwargs: replace(place(*args, **kwargs), grad_sum_axes=("dp", "cp"))

    patches.replace(layers, "sharded", make)


@fault("key/value heads: every copy counts in the norm", "tp4-kv2")
def _(patches: Patches) -> None:
    patches.replace(
        placement.Placement, "copies", lambda copies: lambda placed, mesh: copies(replace(placed, shards=None), mesh)
    )


@fault("what all of tp hold counts in the norm on each rank", "tp2-dp2-documents")
def _(patches: Patches) -> None:
    patches.replace(
        placement.Placement,
        "copies",
        lambda copies: lambda placed, mesh: copies(replace(placed, replicated_over=("dp", "cp")), mesh),
    )


# ---- sequence parallel ----


@fault("gradients of norms are not summed over tp", "tp2-sp-documents")
def _(patches: Patches) -> None:
    patches.replace(decoder, "replicated", lambda place: lambda shape, *, tokens_split=False: place(shape))


@fault("gather: each rank keeps its own gradient", "tp2-sp-no-overlap")
def _(patches: Patches) -> None:
    def make(_: Any) -> Any:
        def own(ctx: Any, grad: torch.Tensor) -> Any:
            tokens = grad.flatten(0, 1).chunk(ctx.group.size)[ctx.group.rank]
            return tokens.view(grad.shape[0], -1, grad.shape[2]), None

        return own

    patches.replace(collectives._GatherTokens, "backward", make)


@fault("scatter: the sum over the ranks is averaged", "tp2-sp-documents")
def _(patches: Patches) -> None:
    patches.replace(
        collectives._ScatterTokens, "forward", lambda forward: lambda ctx, x, group: forward(ctx, x, group) / group.size
    )


# ---- context parallel ----

silenced("targets are counted without cp", "cp2-dense", heads.VocabHead, "begin_step")


@fault("gradients are not summed over cp", "cp2-dp2")
def _(patches: Patches) -> None:
    patches.replace(gradients, "reduction_groups", lambda _: lambda placed, mesh: (mesh.dp,))


@fault("ring: the last hop of the key and value gradients is left out", "cp2-dense")
def _(patches: Patches) -> None:
    calls = [0]

    def count_from_here(backward: Any) -> Any:
        def counted(ctx: Any, dout: torch.Tensor) -> Any:
            calls[0] = 0
            return backward(ctx, dout)

        return counted

    def make(pass_on: Any) -> Any:
        def all_but_last(x: torch.Tensor, cp: Group) -> Any:
            calls[0] += 1
            return Handle((), lambda: [x]) if calls[0] == 2 * cp.size - 1 else pass_on(x, cp)

        return all_but_last

    patches.replace(ring._RingAttention, "backward", count_from_here)
    patches.replace(ring, "_pass_on", make)


@fault("ring: parts are added without their weights", "cp2-dense")
def _(patches: Patches) -> None:
    def make(_: Any) -> Any:
        def added(total: Any, lse: Any, part: Any, part_lse: Any) -> None:
            total.add_(part)
            lse.copy_(torch.logaddexp(lse, part_lse))

        return added

    patches.replace(ring, "_merge", make)


@fault("ring: documents see one another", "cp2-dp2")
def _(patches: Patches) -> None:
    patches.replace(decoder, "context_of", lambda context: lambda rope, documents, *rest: context(rope, None, *rest))


@fault("positions are counted from the first token of the rank", "cp2-dense")
def _(patches: Patches) -> None:
    patches.replace(
        decoder,
        "positions_of",
        lambda positions: lambda shape, documents, cp, **k: positions(shape, documents, SINGLE, **k),
    )


@fault("labels are cut in two halves, tokens in zigzag", "cp2-dense")
def _(patches: Patches) -> None:
    def make(cut: Any) -> Any:
        def labels_in_halves(self: Any, batch: Any) -> Any:
            cp = self.mesh.cp
            halves = [mb.labels.chunk(cp.size, 1)[cp.rank] for mb in batch]
            return [mb._replace(labels=half) for mb, half in zip(cut(self, batch), halves, strict=True)]

        return labels_in_halves

    patches.replace(step.TrainStep, "_cut", make)


@fault("exchange: heads come back in another order", "cp2-ulysses")
def _(patches: Patches) -> None:
    def make(back: Any) -> Any:
        return lambda out, cp: back(out, cp).unflatten(2, (cp.size, -1)).flip(2).flatten(2, 3)

    patches.replace(attend, "tokens_for_heads", make)


@fault("exchange: chunks are taken for those in order", "cp2-ulysses")
def _(patches: Patches) -> None:
    patches.replace(ulysses, "chunks_of", lambda _: lambda rank, size: (2 * rank, 2 * rank + 1))


# ---- pipeline ----

silenced("the norm is that of the own stages", "pp2-documents", gradients, "norm_over_world")
silenced("the loss stays on the last stage", "pp2-documents", pipeline_runner.PipelineRunner, "_through", "broadcast")


@fault("the loss counts on every stage", "pp2-dp2")
def _(patches: Patches) -> None:
    def make(_: Any) -> Any:
        def over_the_world(self: Any, totals: Totals) -> Totals:
            self.mesh.world.all_reduce(totals.values)
            return totals

        return over_the_world

    patches.replace(step.TrainStep, "_summed", make)


@fault("torch divides gradients by the number of micro-batches", "pp2-documents")
def _(patches: Patches) -> None:
    def make(schedule: Any) -> Any:
        return lambda *args, **kwargs: schedule(*args, **{**kwargs, "scale_grads": True})

    patches.replace_item(pipeline._SCHEDULES, "1f1b", make)


@fault("gradients that no hook saw are not reduced", "pp2-dp2-sharded-zbv")
def _(patches: Patches) -> None:
    patches.replace(sharded.ShardedOptimizer, "start_reduction", lambda _: lambda self, keys: None)
    patches.replace(buckets.Buckets, "complete", lambda _: lambda self, keys: None)


@fault("each stage draws its weights as if its layers were the first", "pp2-documents")
def _(patches: Patches) -> None:
    def make(generator: Any) -> Any:
        def alike(seed: int, key: str, block: int) -> Any:
            return generator(seed, re.sub(r"layers\.\d+", "layers.0", key), block)

        return alike

    patches.replace(initialise, "_generator", make)


# ---- sharded optimizer ----

silenced("the norm is that of the own interval", "dp4-sharded", sharded, "norm_over_world")
silenced("sums within tp are left out before the split", "dp2-tp2-sharded-sp", buckets.Buckets, "_start")


@fault("updated weights are not sent", "dp4-sharded")
def _(patches: Patches) -> None:
    patches.replace(buckets.Buckets, "start_gather", lambda _: lambda self: None)


@fault("a micro-batch overwrites the gradients before it", "dp4-sharded")
def _(patches: Patches) -> None:
    def make(_: Any) -> Any:
        def overwritten(self: Any, key: str) -> None:
            p = self.parameters[key]
            if p.grad is not None:
                self._gradients[key].copy_(p.grad)
                self._begun.add(key)
                p.grad = None

        return overwritten

    patches.replace(sharded.ShardedOptimizer, "_fold", make)


@fault("the reduction starts after the first micro-batch", "dp4-sharded")
def _(patches: Patches) -> None:
    def make(accumulated: Any) -> Any:
        def at_once(self: Any, key: str) -> None:
            self._last = True
            accumulated(self, key)

        return at_once

    patches.replace(sharded.ShardedOptimizer, "_accumulated", make)


@fault("gradients are clipped by another norm than the one told", "dp4-sharded")
def _(patches: Patches) -> None:
    patches.replace(sharded, "clip_factor", lambda clip: lambda norm, config: clip(norm / math.sqrt(2), config))
