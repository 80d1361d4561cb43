"""The peer of the benchmark: Partial FC written down plainly, in the steps of insightface's partial_fc and its distributed cross
entropy: random rows beside the labels' own, indexed copies, whole logits, autograd, SGD with momentum on the copied rows.

N_r classes of this rank, m of them scored, D width, B samples of all ranks."""

from __future__ import annotations

from typing import Any

import torch

from opencoder.model.classes.partition import Partition
from opencoder.parallel.group import Group


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return group.all_gather(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.group.reduce_scatter(grad), None


class _CrossEntropy(torch.autograd.Function):
    """Mean over all samples; `labels` are columns of this rank's logits, −1 where another rank has them."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, group: Group) -> torch.Tensor:
        here = torch.where(labels != -1)[0]
        logits = logits - group.all_reduce(logits.max(dim=1, keepdim=True).values, "max")
        logits.exp_()
        logits.div_(group.all_reduce(logits.sum(dim=1, keepdim=True)))
        target = logits.new_zeros(logits.shape[0], 1)
        target[here] = logits[here].gather(1, labels[here, None])
        ctx.save_for_backward(logits, here, labels)
        return -group.all_reduce(target).clamp_min(1e-30).log().mean()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        probabilities, here, labels = ctx.saved_tensors
        probabilities[here, labels[here]] -= 1
        return probabilities.div_(probabilities.shape[0]).mul_(grad), None, None


class PartialFC:
    """`weight` (N_r, D) is updated in place by `step`."""

    def __init__(
        self, weight: torch.Tensor, partition: Partition, group: Group, *, rho: float, lr: float, momentum: float
    ) -> None:
        self.weight, self.partition, self.group = weight, partition, group
        self.lr, self.momentum = lr, momentum
        self.state = torch.zeros_like(weight)
        self.rows = int(rho * weight.shape[0])
        self.scored = torch.empty(0, dtype=torch.int64)
        """(m,) rows of the last step."""

    def select(self, labels: torch.Tensor) -> torch.Tensor:
        """(B,) class ids of all ranks → their columns among the scored rows, −1 for others'."""
        start, count = self.partition.start(self.group.rank), self.weight.shape[0]
        own = (labels >= start) & (labels < start + count)
        local = torch.where(own, labels - start, -1)
        positive = local[own].unique()
        if positive.numel() >= self.rows:
            self.scored = positive
        else:
            drawn = torch.rand(count)
            drawn[positive] = 2.0
            self.scored = drawn.topk(self.rows).indices.sort().values
        return torch.where(own, torch.searchsorted(self.scored, local), -1)

    def step(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """features (b, D), labels (b,) of this rank → mean loss over all; features get their gradient, the rows an update."""
        labels = self.select(self.group.all_gather(labels))
        weight = self.weight[self.scored].requires_grad_()
        logits = _Gather.apply(features, self.group) @ weight.t()
        loss: torch.Tensor = _CrossEntropy.apply(logits, labels, self.group)
        loss.backward()
        assert weight.grad is not None
        with torch.no_grad():
            state = self.state[self.scored].mul_(self.momentum).add_(weight.grad)
            self.state[self.scored] = state
            self.weight[self.scored] = weight.sub_(state, alpha=self.lr)
        return loss.detach()
