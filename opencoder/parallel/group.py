"""A group of ranks as one rank sees it: the only place where training calls torch.distributed.

Every collective is recorded (what, over which group, since when), so that a rank that hangs can be named, and counted
(bytes handed over, seconds waited), so that what communication costs can be told. At size 1 nothing is sent and no
process group is needed, so every layer runs in a plain unit test."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

Op = Literal["sum", "max", "min"]
_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
# torch 2.13 has given two collectives new names and warns at the old ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

Result = TypeVar("Result")


@dataclass(slots=True)
class Record:
    """One collective of this rank."""

    sequence: int
    """Number within its group, from 1: the ranks of a group are at the same number, or one of them is behind."""
    group: str
    """Name of the group: its axes."""
    operation: str
    shape: tuple[int, ...]
    bytes: int
    """What this rank handed over."""
    step: int
    """Optimizer step under way, as told to `Records.step`."""
    started: float
    """time.monotonic() at the call."""
    finished: float | None = None
    """time.monotonic() when its result was at hand; None while it is under way."""


class Totals(NamedTuple):
    """What communication came to since the last `Records.take`."""

    collectives: int
    bytes: int
    """Handed over by this rank."""
    blocked_s: float
    """Host time spent waiting. On CUDA the host does not wait for a collective, so this says nothing there."""


class Records:
    """The last `capacity` collectives of this rank over all groups of its mesh, and totals.

    One thread communicates; others may read `recent` and `unfinished` at any time."""

    def __init__(self, capacity: int = 1024) -> None:
        self.step = 0
        """Set by the training loop; written into every record."""
        self._ring: list[Record | None] = [None] * capacity
        self._next = 0
        self._collectives = self._bytes = 0
        self._blocked_s = 0.0

    def begin(self, group: str, sequence: int, operation: str, tensors: Sequence[torch.Tensor]) -> Record:
        """A collective starts."""
        size = sum(t.numel() * t.element_size() for t in tensors)
        shape = tuple(tensors[0].shape) if tensors else ()
        record = Record(sequence, group, operation, shape, size, self.step, time.monotonic())
        self._ring[self._next % len(self._ring)] = record
        self._next += 1
        self._collectives += 1
        self._bytes += size
        return record

    def end(self, record: Record, blocked_s: float) -> None:
        """Its result is at hand, after waiting `blocked_s` for it."""
        record.finished = time.monotonic()
        self._blocked_s += blocked_s

    def recent(self) -> list[Record]:
        """What is remembered, oldest first."""
        ring, at = list(self._ring), self._next % len(self._ring)
        return [record for record in ring[at:] + ring[:at] if record is not None]

    def unfinished(self) -> list[Record]:
        """Collectives under way, oldest first."""
        return [record for record in self.recent() if record.finished is None]

    def take(self) -> Totals:
        """Totals since the last call; they start again from 0."""
        totals = Totals(self._collectives, self._bytes, self._blocked_s)
        self._collectives = self._bytes = 0
        self._blocked_s = 0.0
        return totals


class Handle(Generic[Result]):
    """A collective under way. Its tensors may not be touched before `wait`."""

    def __init__(
        self,
        works: Sequence[Any],
        finish: Callable[[], Result],
        record: Record | None = None,
        records: Records | None = None,
    ) -> None:
        """`finish` makes the result once all `works` are done."""
        self._works, self._finish, self._record, self._records = works, finish, record, records
        self._result: list[Result] = []

    def wait(self) -> Result:
        """The result; on CUDA the current stream waits, not the host. May be called again."""
        if not self._result:
            start = time.monotonic()
            for work in self._works:
                work.wait()
            result = self._finish()
            self._result.append(result)
            self._works, self._finish = (), lambda: result  # what they held is free, also while this handle is kept
            if self._record is not None and self._records is not None:
                self._records.end(self._record, time.monotonic() - start)
        return self._result[0]


@dataclass(frozen=True, eq=False)
class Group:
    """The ranks along one or several axes: how many, which one this is, and how to reach the others.

    `start_…` returns a `Handle` at once; the method without it waits. Every rank of the group must call the same methods
    in the same order. `process_group` is None at size 1, and in a dry run, where sizes matter and nothing is sent."""

    size: int = 1
    rank: int = 0
    process_group: dist.ProcessGroup | None = None
    name: str = ""
    """Its axes, for messages."""
    ranks: tuple[int, ...] = (0,)
    """Its members as ranks of the world, ascending; `ranks[rank]` is this one."""
    records: Records = field(default_factory=Records, repr=False)
    """Shared by all groups of a mesh."""
    _sequence: Iterator[int] = field(default_factory=lambda: count(1), repr=False)

    def _begin(self, operation: str, tensors: Sequence[torch.Tensor]) -> Record:
        if self.process_group is None:
            raise RuntimeError(
                f"{operation} over {self.name or 'a group'} of {self.size}: nothing is sent in a dry run"
            )
        return self.records.begin(self.name, next(self._sequence), operation, tensors)

    # ---- one tensor in, one out ----

    def start_all_reduce(self, x: torch.Tensor, op: Op = "sum") -> Handle[torch.Tensor]:
        """Reduce `x` over the group in place."""
        if self.size == 1:
            return Handle((), lambda: x)
        record = self._begin("all_reduce", [x])
        work = dist.all_reduce(x, op=_OPS[op], group=self.process_group, async_op=True)
        return Handle((work,), lambda: x, record, self.records)

    def all_reduce(self, x: torch.Tensor, op: Op = "sum") -> torch.Tensor:
        """Reduce `x` over the group in place; nothing to do at size 1."""
        return self.start_all_reduce(x, op).wait()

    def start_all_gather(self, x: torch.Tensor, out: torch.Tensor | None = None) -> Handle[torch.Tensor]:
        """(n, …) of each rank → (size·n, …) in rank order, into `out` if given. At size 1 the result may be `x` itself."""
        if self.size == 1:
            return Handle((), lambda: x if out is None else out.copy_(x))
        x = x.contiguous()
        whole = x.new_empty(self.size * x.shape[0], *x.shape[1:]) if out is None else out
        record = self._begin("all_gather", [x])
        work = _all_gather(whole, x, group=self.process_group, async_op=True)
        return Handle((work,), lambda: whole, record, self.records)

    def all_gather(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """(n, …) of each rank → (size·n, …) in rank order."""
        return self.start_all_gather(x, out).wait()

    def start_reduce_scatter(self, x: torch.Tensor, out: torch.Tensor | None = None) -> Handle[torch.Tensor]:
        """(size·n, …) → this rank's (n, …) of the sum over the group, into `out` if given.

        On gloo the parts are exchanged and added here, 16-bit ones in fp32, in the order of the ranks: gloo's own
        reduce-scatter is an all-reduce inside and sends twice as much."""
        if self.size == 1:
            return Handle((), lambda: x if out is None else out.copy_(x))
        if x.shape[0] % self.size:
            raise ValueError(f"reduce_scatter: {x.shape[0]} rows cannot be split over {self.size} ranks")
        x = x.contiguous()
        mine = x.new_empty(x.shape[0] // self.size, *x.shape[1:]) if out is None else out
        record = self._begin("reduce_scatter", [x])
        if dist.get_backend(self.process_group) != "gloo":
            work = _reduce_scatter(mine, x, group=self.process_group, async_op=True)
            return Handle((work,), lambda: mine, record, self.records)
        parts = torch.empty_like(x)
        work = dist.all_to_all_single(parts, x, group=self.process_group, async_op=True)
        return Handle((work,), lambda: _sum_in_order(parts.chunk(self.size), mine), record, self.records)

    def reduce_scatter(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """(size·n, …) → this rank's (n, …) of the sum over the group."""
        return self.start_reduce_scatter(x, out).wait()

    def start_all_to_all(self, x: torch.Tensor) -> Handle[torch.Tensor]:
        """(size·n, …) → the same shape: row block i goes to rank i, and block j of the result comes from rank j."""
        if self.size == 1:
            return Handle((), lambda: x)
        if x.shape[0] % self.size:
            raise ValueError(f"all_to_all: {x.shape[0]} rows cannot be split over {self.size} ranks")
        x = x.contiguous()
        found = torch.empty_like(x)
        record = self._begin("all_to_all", [x])
        work = dist.all_to_all_single(found, x, group=self.process_group, async_op=True)
        return Handle((work,), lambda: found, record, self.records)

    def all_to_all(self, x: torch.Tensor) -> torch.Tensor:
        """(size·n, …) → the same shape: row block i goes to rank i, and block j of the result comes from rank j."""
        return self.start_all_to_all(x).wait()

    def broadcast(self, x: torch.Tensor, source: int = 0) -> torch.Tensor:
        """`x` of the group's rank `source`, into `x` of all."""
        if self.size > 1:
            record = self._begin("broadcast", [x])
            work = dist.broadcast(x, group=self.process_group, group_src=source, async_op=True)
            return Handle((work,), lambda: x, record, self.records).wait()
        return x

    # ---- from rank to rank ----

    def start_exchange(
        self, sends: Sequence[tuple[torch.Tensor, int]], receives: Sequence[tuple[torch.Tensor, int]]
    ) -> Handle[list[torch.Tensor]]:
        """Send each (contiguous tensor, rank of the group) and fill each (contiguous tensor, rank of the group), all at
        one time, so that no order of the ranks can lock them. The result: the received tensors."""
        received = [tensor for tensor, _ in receives]
        operations = [
            dist.P2POp(call, tensor, group=self.process_group, group_peer=peer)
            for call, pairs in ((dist.isend, sends), (dist.irecv, receives))
            for tensor, peer in pairs
        ]
        if not operations:
            return Handle((), lambda: received)
        record = self._begin("exchange", [tensor for tensor, _ in sends])
        return Handle(dist.batch_isend_irecv(operations), lambda: received, record, self.records)

    # ---- anything else ----

    def gather_objects(self, value: Any) -> list[Any]:
        """The picklable `value` of every rank, in rank order, on all of them. Slow: not for every micro-batch."""
        if self.size == 1:
            return [value]
        record, start = self._begin("gather_objects", []), time.monotonic()
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.process_group)
        self.records.end(record, time.monotonic() - start)
        return found

    def barrier(self) -> None:
        """Wait for every rank of the group."""
        if self.size > 1:
            record, start = self._begin("barrier", []), time.monotonic()
            dist.barrier(group=self.process_group)
            self.records.end(record, time.monotonic() - start)


SINGLE = Group()
"""One rank alone."""


def _sum_in_order(parts: Sequence[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
    """Always first + second + …: the same bits on every run."""
    wide = torch.float32 if parts[0].dtype in (torch.bfloat16, torch.float16) else parts[0].dtype
    total = parts[0].to(wide, copy=True)
    for part in parts[1:]:
        total += part
    return out.copy_(total)


# ---- processes and groups ----


def start_processes(device_type: str, *, timeout_s: float) -> None:
    """Set up the default process group from torchrun's variables: nccl on CUDA, gloo on the CPU."""
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=timedelta(seconds=timeout_s))


def stop_processes() -> None:
    """Close all process groups, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world_group(records: Records) -> Group:
    """All ranks of the default process group; this process alone without one."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return Group(name="world", records=records)
    size = dist.get_world_size()
    return Group(size, dist.get_rank(), dist.group.WORLD, "world", tuple(range(size)), records)


def new_group(name: str, parts: Sequence[Sequence[int]], world: Group, *, timeout_s: float | None = None) -> Group:
    """Make one process group of each of `parts` (disjoint, ascending ranks of the world); returns the one with this rank.

    Every rank of the world must call this with the same arguments in the same order. A rank in no part, or alone in
    its part, gets a group of size 1."""
    # Without a time-out of its own, torch gives a group the default of its backend, whatever the default group has.
    timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
    own = Group(name=name, ranks=(world.rank,), records=world.records)
    for ranks in parts:
        if len(ranks) < 2:
            continue
        made = dist.new_group(list(ranks), timeout=timeout)
        if world.rank in ranks:
            own = Group(len(ranks), list(ranks).index(world.rank), made, name, tuple(ranks), world.records)
    return own


def torch_mesh(device_type: str, groups: Sequence[Group], ranks: torch.Tensor, names: Sequence[str]) -> DeviceMesh:
    """torch's mesh over `groups` that exist already: `ranks` has one dimension for each of them."""
    process_groups = [group.process_group for group in groups]
    return DeviceMesh.from_group(
        process_groups if len(process_groups) > 1 else process_groups[0],  # type: ignore[arg-type]
        device_type,
        mesh=ranks,
        mesh_dim_names=tuple(names),
    )
