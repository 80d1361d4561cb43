"""Micro-batches of labelled samples through an encoder, and its evaluation over all classes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from opencoder.data.loader import MASKED, MicroBatch
from opencoder.model.encoder import Encoder
from opencoder.parallel.mesh import Mesh

from .step import SequentialRunner
from .totals import Totals

TOP = 5
"""Classes whose logits are the highest, among which a label is looked for."""


class ClassRunner(SequentialRunner[Encoder]):
    """One micro-batch after another through the whole encoder. The losses have no groups."""

    def begin_step(self, targets_of_all_micro_batches: Iterable[torch.Tensor]) -> torch.Tensor:
        """The head's count; in training it selects the classes of the step."""
        return self.model.begin_step(targets_of_all_micro_batches)

    def _loss(self, mb: MicroBatch, totals: Totals) -> torch.Tensor:
        inputs, labels, lengths = inputs_of(mb, self.device)
        loss_sum, statistics = self.model.loss(inputs, labels, lengths)
        totals.add(loss_sum, statistics, labels, None)
        return loss_sum


def inputs_of(mb: MicroBatch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Tokens or features, labels and lengths of a micro-batch on the device."""
    inputs, labels = (x.to(device, non_blocking=True) for x in (mb.tokens, mb.labels))
    return inputs, labels, None if mb.lengths is None else mb.lengths.to(device, non_blocking=True)


class Evaluation(NamedTuple):
    """Means over the evaluated samples, the same on every rank."""

    loss: float
    """Over all classes, whatever a training step scores, with the margin if there is one."""
    top1: float
    """Share of samples whose label has the highest logit; of equal ones the smaller class counts as higher."""
    top5: float


@torch.no_grad()
def evaluate(model: Encoder, mesh: Mesh, batches: Iterable[Sequence[MicroBatch]], device: torch.device) -> Evaluation:
    """Over all ranks' micro-batches; samples that are masked do not count. Called by all ranks, with as many micro-batches."""
    model.eval()
    top = min(TOP, model.lm_head.partition.classes)
    sums = torch.zeros(
        4, dtype=torch.float64, device=device
    )  # losses, samples, in the first place, among the first five
    for batch in batches:
        model.begin_step(mb.labels.to(device) for mb in batch)
        for mb in batch:
            inputs, labels, lengths = inputs_of(mb, device)
            features = model.features(inputs, lengths)
            valid = labels != MASKED  # a masked label is no class that could be found
            found = model.topk(features, top)[1] == labels[:, None]  # (B, TOP)
            sums += torch.stack(
                [
                    model.loss_of_features(features, labels)[0].double(),
                    valid.sum().double(),
                    found[:, 0].sum().double(),
                    found.any(1).sum().double(),
                ]
            )
    mesh.group(("dp", "cp")).all_reduce(sums)
    loss, samples, first, five = sums.tolist()
    samples = max(samples, 1.0)
    return Evaluation(loss / samples, first / samples, five / samples)
