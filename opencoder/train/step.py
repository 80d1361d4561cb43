"""One optimizer update: what the training loop and the parity tests both run.

The parts are exchangeable: a `Runner` takes the micro-batches forward and backward, an optimizer (optim/base.py) sums
and applies the gradients, a guard may ask to skip the step. Nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import nn

from opencoder.data.loader import MicroBatch
from opencoder.model.decoder import Decoder, Documents
from opencoder.optim.base import Optimizer
from opencoder.parallel.context import split_sequence
from opencoder.parallel.mesh import Mesh

from .totals import Totals

Model = TypeVar("Model", bound=nn.Module)
Guard = Callable[[torch.Tensor, torch.Tensor], torch.Tensor | None]
"""(global loss, gradient norm) → a boolean tensor, equal on all ranks, that is true where the update must be left out; None:
never. It may raise to stop the run before the update."""


class StepResult(NamedTuple):
    """0-dim tensors, the same on every rank."""

    loss: torch.Tensor
    """Mean over the unmasked targets of the global batch, fp64."""
    grad_norm: torch.Tensor
    """Before clipping."""
    clip: torch.Tensor
    """Factor the gradients were multiplied by; 1: not clipped."""
    targets: torch.Tensor
    """Unmasked ones of the global batch, at least 1."""
    skip: torch.Tensor | None
    """What the guard said."""
    z_loss: torch.Tensor | None = None
    """What the z-loss adds to the loss, fp64."""
    by_group: torch.Tensor | None = None
    """(2, groups), fp64: for each group of the data sum of token losses and number of unmasked targets in the global batch;
    None unless asked for."""


def inputs_of(mb: MicroBatch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, Documents | None]:
    """Tokens, labels and document bounds of a micro-batch on the device."""
    documents = None
    if mb.cu_seqlens is not None and mb.max_seqlen is not None:
        documents = Documents(mb.cu_seqlens.to(device, non_blocking=True), mb.max_seqlen)
    return mb.tokens.to(device, non_blocking=True), mb.labels.to(device, non_blocking=True), documents


def groups_of(mb: MicroBatch, device: torch.device) -> torch.Tensor | None:
    """Its groups on the device."""
    return None if mb.groups is None else mb.groups.to(device, non_blocking=True)


class Runner(Protocol):
    """Takes the micro-batches of this rank through the model."""

    def begin_step(self, targets_of_all_micro_batches: Iterable[torch.Tensor]) -> torch.Tensor:
        """Unmasked targets of the step over all ranks, 0-dim, as the head counts them."""

    def run(self, micro_batches: Sequence[MicroBatch], count: torch.Tensor, *, groups: int = 0) -> Totals:
        """Forward and backward of all: the gradients of (sum of token losses / `count`) are folded into the optimizer's.
        Returns sums over this rank's tokens, by group for as many `groups`, the same on every rank of a pipeline."""

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> Totals:
        """The same sums without gradients."""


class SequentialRunner(Generic[Model]):
    """One micro-batch after another through the whole model."""

    def __init__(self, model: Model, optimizer: Optimizer, device: torch.device) -> None:
        self.model, self.optimizer, self.device = model, optimizer, device

    def begin_step(self, targets_of_all_micro_batches: Iterable[torch.Tensor]) -> torch.Tensor:
        """The count of the step."""
        raise NotImplementedError

    def run(self, micro_batches: Sequence[MicroBatch], count: torch.Tensor, *, groups: int = 0) -> Totals:
        """Forward, backward and fold for each."""
        totals = Totals(self.device, groups)
        for i, mb in enumerate(micro_batches):
            loss_sum = self._loss(mb, totals)
            if i == len(micro_batches) - 1:
                self.optimizer.last_backward()
            (loss_sum / count).backward()
            self.optimizer.fold_gradients()
        return totals

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> Totals:
        """Forward alone."""
        totals = Totals(self.device)
        for mb in micro_batches:
            self._loss(mb, totals)
        return totals

    def _loss(self, mb: MicroBatch, totals: Totals) -> torch.Tensor:
        """The sum of its losses, which is added to `totals`."""
        raise NotImplementedError


class DecoderRunner(SequentialRunner[Decoder]):
    """Micro-batches of text through a decoder."""

    def begin_step(self, targets_of_all_micro_batches: Iterable[torch.Tensor]) -> torch.Tensor:
        """The head's count."""
        return self.model.lm_head.begin_step(targets_of_all_micro_batches)

    def _loss(self, mb: MicroBatch, totals: Totals) -> torch.Tensor:
        tokens, labels, documents = inputs_of(mb, self.device)
        loss_sum, statistics = self.model.loss(tokens, labels, documents)
        totals.add(loss_sum, statistics, labels, groups_of(mb, self.device) if totals.groups else None)
        return loss_sum


class TrainStep:
    """Updates `model` with `optimizer`, the same way for one process and many."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        mesh: Mesh,
        *,
        device: torch.device,
        runner: Runner | None = None,
        guard: Guard | None = None,
    ) -> None:
        """`runner` None: micro-batches one after another through the whole model, a Decoder."""
        self.model, self.optimizer, self.mesh, self.device, self.guard = model, optimizer, mesh, device, guard
        if runner is None:
            assert isinstance(model, Decoder), type(model)
            runner = DecoderRunner(model, optimizer, device)
        self.runner: Runner = runner

    def update(self, micro_batches: Sequence[MicroBatch], *, lr: float, groups: int = 0) -> StepResult:
        """One optimizer update on this rank's share of a global batch: whole samples, which are cut over cp here. `groups`: how
        many groups of the data the losses are to be summed by."""
        self.model.train()
        micro_batches = self._cut(micro_batches)
        count = self._count(micro_batches)
        totals = self._summed(self.runner.run(micro_batches, count, groups=groups))
        grad_norm = self.optimizer.finish_reduction()
        loss = totals.loss / count
        skip = self.guard(loss, grad_norm) if self.guard is not None else None
        clip = self.optimizer.step(lr=lr, skip=skip)
        by_group = totals.by_group if groups else None
        return StepResult(loss, grad_norm, clip, count, skip, totals.z_loss / count, by_group)

    def evaluate(self, batches: Iterable[Sequence[MicroBatch]]) -> torch.Tensor:
        """Mean token loss over all ranks' micro-batches, 0-dim fp64, the same on every rank. One batch is held at a time."""
        self.model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        count = torch.zeros((), dtype=torch.int64, device=self.device)
        for batch in batches:
            micro_batches = self._cut(batch)
            count += self.runner.begin_step(self._labels(micro_batches))
            total += self._summed(self.runner.evaluate(micro_batches)).loss
        return total / count.clamp(min=1)

    def _cut(self, micro_batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """This rank's tokens and labels of each sample. The document bounds stay those of whole samples."""
        cp = self.mesh.cp
        return [
            mb._replace(
                tokens=split_sequence(mb.tokens, cp),
                labels=split_sequence(mb.labels, cp),
                groups=None if mb.groups is None else split_sequence(mb.groups, cp),
            )
            for mb in micro_batches
        ]

    def _count(self, micro_batches: Sequence[MicroBatch]) -> torch.Tensor:
        """Unmasked targets over all ranks, at least 1."""
        return self.runner.begin_step(self._labels(micro_batches)).clamp(min=1)

    def _labels(self, micro_batches: Sequence[MicroBatch]) -> Iterable[torch.Tensor]:
        return (mb.labels.to(self.device, non_blocking=True) for mb in micro_batches)

    def _summed(self, totals: Totals) -> Totals:
        self.mesh.group(("dp", "cp")).all_reduce(totals.values)
        return totals
