"""The memory of a rank through one step: one piece of work of its schedule after another, made of the modules of
estimate_layers.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import NamedTuple

from opencoder.parallel import gradients as _gradients
from opencoder.parallel.pipeline import Work

from .estimate_layers import Module, Sizes


class Moment(NamedTuple):
    """Bytes on a rank at one time."""

    what: str
    weights: int
    optimizer: int
    """State and master weights."""
    gradients: int
    activations: int
    """Kept of layers, of all micro-batches in flight."""
    head: int
    """Kept of the head: its gradients, which are worked out in forward, or logits."""
    working: int
    """What the piece of work at hand needs beside."""
    buckets: int
    """Copies of gradients on their way."""
    sent: int
    """On its way between pipeline stages."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self[1:])


@dataclass
class Walk:
    """A rank's way through a step."""

    sizes: Sizes
    stages: Mapping[int, Sequence[Module]]
    weights: int
    optimizer: int
    sharded: bool
    """Main gradients are there from the start."""
    copies: Sequence[tuple[int, int]] = ()
    """Of each bucket in the order of backward: weights that it holds, and the room it takes while it is reduced."""
    moments: list[Moment] = field(default_factory=list)
    alive: dict[tuple[int, int], int] = field(default_factory=dict)
    """(stage, micro-batch), run forward → gradients held until the backward of weights, less what is freed before."""
    begun: set[int] = field(default_factory=set)
    """Stages that have main gradients."""
    sent: int = 0

    def run(self, order: Sequence[Work], *, split: bool) -> None:
        """The whole step. `split`: the backward of inputs and of weights are apart."""
        last = {work.stage: work for work in order if work.kind in ("BI" if not split else "BW")}
        for work in order:
            if work.kind == "F":
                self._forward(work)
            elif work.kind == "B" or (work.kind == "I" and not split):
                self._backward(work, last=last[work.stage] == work)
            elif work.kind == "I":
                self._backward_of_inputs(work)
            elif split:
                self._backward_of_weights(work)

    def update(self, copies: int, working: int) -> None:
        """After all of it: gradients are summed, with `copies` of some, and weights changed."""
        self._note("the sum of gradients", buckets=copies)
        self._note("the update", working=working)

    def _note(
        self, what: str, *, kept: Sequence[Module] = (), working: int = 0, gradients: int = 0, buckets: int = 0
    ) -> None:
        """`kept`: modules whose activations of the micro-batch at hand are there."""
        wide = self.sizes.wide // self.sizes.width
        modules = [*kept, *(module for stage, _ in self.alive for module in self.stages[stage])]
        stages = self.stages if self.sharded else self.begun
        main = sum(module.weights * wide for stage in stages for module in self.stages[stage])
        self.moments.append(
            Moment(
                what,
                self.weights,
                self.optimizer,
                main + gradients,
                sum(module.kept for module in modules if not module.head),
                sum(module.kept for module in modules if module.head),
                working + sum(self.alive.values()),
                buckets,
                self.sent,
            )
        )

    def _forward(self, work: Work) -> None:
        modules = self.stages[work.stage]
        for i, module in enumerate(modules):
            self._note(f"forward of {_name(work)}", kept=modules[:i], working=module.forward)
        self.alive[work.stage, work.micro_batch] = 0
        self._note(f"forward of {_name(work)}")

    def _backward(self, work: Work, *, last: bool) -> None:
        del self.alive[work.stage, work.micro_batch]
        # As they are made, gradients of all weights come together in `.grad`: where there are no main gradients yet, or where they
        # are narrower and folded into those after the whole of it. With a sharded optimizer each is folded at once.
        collected = not self.sharded and (self.sizes.width < self.sizes.wide or work.stage not in self.begun)
        modules, made = self.stages[work.stage], 0
        overlapped = last and len(self.stages) == 1
        for i in range(len(modules) - 1, -1, -1):
            module = modules[i]
            for step in module.backward:
                self._note(
                    f"backward of {_name(work)}",
                    kept=modules[: i + 1],
                    working=step.live - module.kept,
                    gradients=(made + step.made if collected else 0) + step.making,
                    buckets=self._under_way(made + step.made) if overlapped else 0,
                )
            made += module.weights
        self._note(f"backward of {_name(work)}", gradients=made if collected else 0)
        self.begun.add(work.stage)

    def _under_way(self, made: int) -> int:
        """Room that the reductions under way take when gradients of `made` weights are there."""
        ends = accumulate(weights for weights, _ in self.copies)
        started = [room for end, (_, room) in zip(ends, self.copies, strict=True) if end <= made]
        return sum(started[-_gradients.IN_FLIGHT :])

    def _backward_of_inputs(self, work: Work) -> None:
        """All that is kept stays, and so do the gradients of what the matrices gave."""
        key, held = (work.stage, work.micro_batch), 0
        if work.stage == 0:  # torch leaves it all to the backward of weights
            self.alive[key] = self.sizes.hidden
            return
        for module in reversed(self.stages[work.stage]):
            most = max(step.live for step in module.backward)
            self._note(f"backward of inputs of {_name(work)}", working=held + max(module.held, most - module.kept))
            held += module.held
        self.alive[key] = held - sum(module.dropped for module in self.stages[work.stage])

    def _backward_of_weights(self, work: Work) -> None:
        if work.stage == 0:
            self._backward(work, last=False)
            return
        del self.alive[work.stage, work.micro_batch]
        collected = self.sizes.width < self.sizes.wide or work.stage not in self.begun
        modules, made = self.stages[work.stage], 0
        for i, module in enumerate(modules):
            making = max((after.made - before.made for before, after in pairwise(module.backward)), default=0)
            left = modules[i:]
            self._note(
                f"backward of weights of {_name(work)}",
                kept=left,
                working=sum(m.held - m.dropped for m in left),
                gradients=(made if collected else 0) + max(making, module.backward[0].making),
            )
            made += module.weights
        self._note(f"backward of weights of {_name(work)}", gradients=made if collected else 0)
        self.begun.add(work.stage)


def _name(work: Work) -> str:
    return f"micro-batch {work.micro_batch} in stage {work.stage}"
