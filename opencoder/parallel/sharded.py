"""Flat buffers of parameters and gradients, split over the data-parallel ranks (ZeRO-1, arXiv:1910.02054).

A bucket holds some parameters one after another. Each rank owns one equal interval of it: gradients arrive there by a
reduce-scatter, the optimizer updates that interval of the weights, and an all-gather brings it to the others. Buckets follow
the backward pass, so the first is complete while most of backward is still to come."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from . import gradients as _gradients
from .gradients import DATA_AXES, reduction_groups
from .group import Group, Handle
from .mesh import Mesh
from .placement import Placement

ALIGNMENT = 16
"""Elements. Parameters begin, and the ranks' intervals end, at multiples of this: 64 bytes in fp32."""

Interval = tuple[int, int]


@dataclass(eq=False)
class Bucket:
    """Parameters of one type whose gradients are summed over the same groups."""

    own: tuple[Group, ...]
    """Groups the gradients are summed over before the data axes."""
    data: Group
    """Ranks that share the bucket."""
    slots: dict[str, Interval]
    """Key → where its values are in the flat buffers."""
    weights: torch.Tensor
    """(n,), n a multiple of ALIGNMENT · ranks; the parameters are views of it."""
    gradients: torch.Tensor
    """(n,), fp32 or wider. After the reduction only this rank's interval holds the sum."""
    awaited: set[str] = field(default_factory=set)
    """Keys whose gradients are not complete yet in this step."""
    reduction: Handle[torch.Tensor] | None = None
    gathering: Handle[torch.Tensor] | None = None

    @property
    def share(self) -> Interval:
        """What this rank owns."""
        size = self.weights.numel() // self.data.size
        return self.data.rank * size, (self.data.rank + 1) * size

    def owned(self, key: str) -> Interval:
        """What this rank owns of parameter `key`, in the buffers. May be empty (begin = end)."""
        (first, last), (begin, end) = self.share, self.slots[key]
        begin = min(max(begin, first), end)
        return begin, max(begin, min(end, last))


class Buckets:
    """All parameters of this rank in buckets, and the communication of each. Parameters become views of the buffers."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], placements: Mapping[str, Placement], mesh: Mesh) -> None:
        """`parameters` in the order of the forward pass. Raises ValueError for one that is not equal over the data axes."""
        self.parameters = dict(parameters)
        classes: dict[tuple[tuple[Group, ...], torch.dtype], list[str]] = defaultdict(list)
        data = mesh.group(DATA_AXES)
        for key, p in reversed(self.parameters.items()):
            if not set(DATA_AXES) <= set(placements[key].replicated_over) & set(placements[key].grad_sum_axes):
                raise ValueError(f"{key} is not the same on all data-parallel ranks: it cannot be split over them")
            own = tuple(g for g in reduction_groups(placements[key], mesh) if g is not data)
            classes[own, p.dtype].append(key)
        # Those with a sum of their own before come last: they wait for it, and the others should not.
        self.buckets = [
            self._bucket(own, data, keys)
            for (own, _), members in sorted(classes.items(), key=lambda item: len(item[0][0]))
            for keys in self._cut(members)
        ]
        self.of = {key: bucket for bucket in self.buckets for key in bucket.slots}
        self._next = 0

    def _cut(self, keys: list[str]) -> list[list[str]]:
        """Consecutive keys up to BUCKET_BYTES of gradients together; a larger parameter has a bucket to itself."""
        found: list[list[str]] = []
        total = 0
        for key in keys:
            p = self.parameters[key]
            size = p.numel() * max(p.element_size(), 4)
            if not found or total + size > _gradients.BUCKET_BYTES:
                found.append([])
                total = 0
            found[-1].append(key)
            total += size
        return found

    @torch.no_grad()
    def _bucket(self, own: tuple[Group, ...], data: Group, keys: list[str]) -> Bucket:
        slots, at = {}, 0
        for key in keys:
            slots[key] = (at, at + self.parameters[key].numel())
            at = _round_up(slots[key][1], ALIGNMENT)
        p = self.parameters[keys[0]]
        wide = torch.float64 if p.dtype == torch.float64 else torch.float32
        length = _round_up(at, ALIGNMENT * data.size)
        weights = torch.zeros(length, dtype=p.dtype, device=p.device)
        for key, (begin, end) in slots.items():
            parameter = self.parameters[key]
            view = weights[begin:end].view(parameter.shape)
            view.copy_(parameter)
            parameter.data = view
        # Between the slots gradients stay 0 for ever; within them every step begins by overwriting.
        gradients = torch.zeros(length, dtype=wide, device=p.device)
        return Bucket(own, data, slots, weights, gradients, set(keys))

    def gradient(self, key: str) -> torch.Tensor:
        """The main gradient of `key`, in the parameter's shape."""
        bucket = self.of[key]
        begin, end = bucket.slots[key]
        return bucket.gradients[begin:end].view(self.parameters[key].shape)

    # ---- gradients ----

    def complete(self, keys: Iterable[str]) -> None:
        """The gradients of `keys` are complete: start the reduction of every bucket that now is, always in one order, which
        all ranks must share."""
        for key in keys:
            self.of[key].awaited.discard(key)
        while self._next < len(self.buckets) and not self.buckets[self._next].awaited:
            self._start(self._next)
            self._next += 1

    def _start(self, index: int) -> None:
        bucket = self.buckets[index]
        earlier = self.buckets[index - _gradients.IN_FLIGHT] if index >= _gradients.IN_FLIGHT else None
        if earlier is not None and earlier.reduction is not None:
            earlier.reduction.wait()
        for group in bucket.own:
            group.all_reduce(bucket.gradients)
        begin, end = bucket.share
        out = bucket.gradients[begin:end] if bucket.data.size > 1 else None
        bucket.reduction = bucket.data.start_reduce_scatter(bucket.gradients, out)

    def finish(self) -> None:
        """Reduce what was not started, and wait for all of it. Every rank's interval then holds the sum."""
        self.complete(list(self.of))
        for bucket in self.buckets:
            if bucket.reduction is not None:
                bucket.reduction.wait()
            bucket.reduction = None
            bucket.awaited = set(bucket.slots)
        self._next = 0

    # ---- weights ----

    def start_gather(self) -> None:
        """This rank's interval of the weights has changed: start to exchange them, in the order of the forward pass."""
        for bucket in reversed(self.buckets):
            if bucket.data.size > 1:
                begin, end = bucket.share
                bucket.gathering = bucket.data.start_all_gather(bucket.weights[begin:end], bucket.weights)

    def wait_weights(self, keys: Iterable[str] | None = None) -> None:
        """Until the weights of `keys` (None: all) are those of the last update."""
        for bucket in self.buckets if keys is None else {id(self.of[key]): self.of[key] for key in keys}.values():
            if bucket.gathering is not None:
                bucket.gathering.wait()
                bucket.gathering = None

    def wait_before_forward(self, root: nn.Module) -> None:
        """Each child of `root`, as it is called, waits for its own weights alone.

        A module without a forward (a container) hands this on to its children; if it has none that are called (a head, whose
        loss is another method), the module before it waits for it too, since no hook would see its call."""
        keys = {id(p): key for key, p in self.parameters.items()}
        units: list[tuple[nn.Module, list[str]]] = []

        def visit(module: nn.Module) -> None:
            for child in module.children():
                called = type(child).forward is not nn.Module.forward
                if not called and any(True for _ in child.children()):
                    visit(child)
                    continue
                own = [keys[id(p)] for p in child.parameters() if id(p) in keys]
                if called or not units:
                    units.append((child, own))
                else:
                    units[-1][1].extend(own)

        visit(root)
        direct = [keys[id(p)] for p in root.parameters(recurse=False) if id(p) in keys]
        seen = {key for _, own in units for key in own} | set(direct)
        absent = [keys[id(p)] for p in root.parameters() if id(p) in keys and keys[id(p)] not in seen]
        assert not absent, absent
        for module, own in units:
            waited = [*own, *direct]
            module.register_forward_pre_hook(lambda *_, waited=waited: self.wait_weights(waited))

    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(b.weights.nbytes + b.gradients.nbytes for b in self.buckets)


def _round_up(n: int, multiple: int) -> int:
    return math.ceil(n / multiple) * multiple
