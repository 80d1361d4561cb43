"""Where a parameter lives. Optimizer, clipping, checkpoint, converter and gradient reduction read this alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from .mesh import Mesh


class Rectangle(NamedTuple):
    """A box of the global tensor that lies in one piece of this rank's flat local tensor."""

    offsets: tuple[int, ...]
    """Of its first element in the global tensor."""
    sizes: tuple[int, ...]
    begin: int
    """Of its first element in the flat local tensor; it ends sizes[0]·sizes[1]·… later."""


@dataclass(frozen=True)
class Placement:
    """`shard_dim` of the global tensor is split over `axis` (both None: not split), into `shards` parts: fewer than
    the axis has ranks if neighbours hold the same part (key/value heads fewer than tp). Where it does not come out even, the
    first parts hold one more. The same values stand on all ranks of `replicated_over`. Its gradient is a partial sum over
    `grad_sum_axes` and must be summed there."""

    global_shape: tuple[int, ...]
    shard_dim: int | None = None
    axis: str | None = None
    replicated_over: tuple[str, ...] = ("dp", "cp", "tp")
    grad_sum_axes: tuple[str, ...] = ("dp", "cp")
    shards: int | None = None
    """None: as many as the axis has ranks."""

    def slice_of(self, mesh: Mesh) -> tuple[slice, ...]:
        """This rank's part of the global tensor, as slices."""
        slices = [slice(0, n) for n in self.global_shape]
        if self.shard_dim is not None and self.axis is not None:
            group = mesh.axis(self.axis)
            parts = self.shards or group.size
            least, larger = divmod(self.global_shape[self.shard_dim], parts)
            part = group.rank * parts // group.size
            start, stop = (i * least + min(i, larger) for i in (part, part + 1))
            slices[self.shard_dim] = slice(start, stop)
        return tuple(slices)

    def copies(self, mesh: Mesh) -> int:
        """Ranks of the world that hold the same values as this one, itself included: what a sum over the world must divide
        by to count every value once."""
        held = math.prod(mesh.axis(axis).size for axis in self.replicated_over)
        if self.axis is None or self.shards is None:
            return held
        return held * (mesh.axis(self.axis).size // self.shards)

    def rectangles(self, mesh: Mesh, interval: tuple[int, int] | None = None) -> list[Rectangle]:
        """Where the elements [begin, end) of this rank's flat local tensor (None: all) stand in the global one.

        An interval of a matrix is up to three boxes: the rest of a row, whole rows, the start of a row."""
        part = self.slice_of(mesh)
        shape = tuple(s.stop - s.start for s in part)
        begin, end = interval or (0, math.prod(shape))
        if not 0 <= begin <= end <= math.prod(shape):
            raise ValueError(f"interval [{begin}, {end}) lies outside the {math.prod(shape)} elements of this rank")
        found = []
        for offsets, sizes in _boxes(shape, begin, end):
            where = tuple(s.start + o for s, o in zip(part, offsets, strict=True))
            found.append(Rectangle(where, sizes, begin))
            begin += math.prod(sizes)
        return found


Box = tuple[tuple[int, ...], tuple[int, ...]]


def _boxes(shape: tuple[int, ...], begin: int, end: int) -> Iterator[Box]:
    """Offsets and sizes of the fewest boxes that make up the flat interval [begin, end) of a row-major tensor, in order."""
    if begin == end:
        return
    if len(shape) < 2:
        yield (begin,) * len(shape), (end - begin,) * len(shape)
        return
    row = math.prod(shape[1:])

    def within(index: int, low: int, high: int) -> Iterator[Box]:
        for offsets, sizes in _boxes(shape[1:], low, high):
            yield (index, *offsets), (1, *sizes)

    first, last = begin // row, end // row
    if begin % row:
        yield from within(first, begin % row, row if first < last else end % row)
        first += 1
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    if end % row and first <= last:
        yield from within(last, 0, end % row)


def sharded(global_shape: tuple[int, ...], shard_dim: int, axis: str = "tp", *, shards: int | None = None) -> Placement:
    """Split over `axis`, equal over the data axes. With `shards`, neighbours of the axis hold the same part, and each of them a
    part of its gradient: only tp can have those, and they are the mesh's group `kv`."""
    data = ("dp", "cp")
    if shards is None:
        return Placement(global_shape, shard_dim, axis, replicated_over=data)
    return Placement(global_shape, shard_dim, axis, replicated_over=data, grad_sum_axes=(*data, "kv"), shards=shards)


def replicated(global_shape: tuple[int, ...], *, tokens_split: bool = False) -> Placement:
    """The same on every rank of a pipeline stage. `tokens_split`: each rank of tp has seen a part of the tokens (sequence
    parallelism), so that its gradient is a part of the sum there too."""
    return Placement(global_shape, grad_sum_axes=("dp", "cp", "tp") if tokens_split else ("dp", "cp"))


def at_both_ends(placement: Placement) -> Placement:
    """The same of a parameter that the first and the last rank of a pipeline hold both, each with a part of its gradient."""
    return replace(
        placement,
        replicated_over=(*placement.replicated_over, "embed"),
        grad_sum_axes=(*placement.grad_sum_axes, "embed"),
    )


def place(parameter: torch.nn.Parameter, placement: Placement) -> torch.nn.Parameter:
    """Attach `placement` and return the parameter."""
    parameter.placement = placement  # type: ignore[attr-defined]
    return parameter


def placement_of(parameter: torch.Tensor) -> Placement:
    """The placement of a parameter; a parameter without one is a defect of the layer that made it."""
    placement = getattr(parameter, "placement", None)
    if placement is None:
        raise TypeError(f"parameter of shape {tuple(parameter.shape)} has no placement: its layer must call place()")
    return placement
