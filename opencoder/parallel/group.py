"""A group of ranks as one rank sees it: the only place where training calls torch.distributed.

Every collective is recorded (what, over which group, since when), so that a rank that hangs can be named, and counted
(bytes handed over, seconds waited), so that what communication costs can be told. At size 1 nothing is sent and no
process group is needed, so every layer runs in a plain unit test."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from typing import Any, Literal
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .meeting import store_of_torchrun
from .records import RECEIVE, CommunicationError, Handle, Record, Records, Result

Op = Literal["sum", "max", "min"]
_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
# torch 2.13 has given two collectives new names and warns at the old ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


_OPEN: WeakSet[Group] = WeakSet()
"""The groups of this process that hold one of torch's."""


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

    def __post_init__(self) -> None:
        if self.process_group is not None:
            _OPEN.add(self)

    def _begin(self, operation: str, tensors: Sequence[torch.Tensor]) -> Record:
        if self.process_group is None:
            raise RuntimeError(
                f"{operation} over {self.name or 'a group'} of {self.size}: nothing is sent in a dry run"
            )
        return self.records.begin(self.name, next(self._sequence), operation, tensors, self.ranks)

    def _start(
        self,
        operation: str,
        tensors: Sequence[torch.Tensor],
        launch: Callable[[], Any],
        finish: Callable[[], Result],
    ) -> Handle[Result]:
        """Record the operation and `launch` it; that gives what is to be waited for, one or several."""
        record = self._begin(operation, tensors)
        try:
            works = launch()
        except dist.DistError as error:
            raise CommunicationError(record, error) from error
        return Handle(works if isinstance(works, list) else [works], finish, record, self.records)

    # ---- one tensor in, one out ----

    def start_all_reduce(self, x: torch.Tensor, op: Op = "sum") -> Handle[torch.Tensor]:
        """Reduce `x` over the group in place."""
        if self.size == 1:
            return Handle((), lambda: x)
        return self._start(
            "all_reduce",
            [x],
            lambda: dist.all_reduce(x, op=_OPS[op], group=self.process_group, async_op=True),
            lambda: x,
        )

    def all_reduce(self, x: torch.Tensor, op: Op = "sum") -> torch.Tensor:
        """Reduce `x` over the group in place; nothing to do at size 1."""
        return self.start_all_reduce(x, op).wait()

    def start_all_gather(self, x: torch.Tensor, out: torch.Tensor | None = None) -> Handle[torch.Tensor]:
        """(n, …) of each rank → (size·n, …) in rank order, into `out` if given. At size 1 the result may be `x` itself."""
        if self.size == 1:
            return Handle((), lambda: x if out is None else out.copy_(x))
        x = x.contiguous()
        whole = x.new_empty(self.size * x.shape[0], *x.shape[1:]) if out is None else out
        return self._start(
            "all_gather",
            [x],
            lambda: _all_gather(whole, x, group=self.process_group, async_op=True),
            lambda: whole,
        )

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
        if self.process_group is not None and dist.get_backend(self.process_group) != "gloo":
            return self._start(
                "reduce_scatter",
                [x],
                lambda: _reduce_scatter(mine, x, group=self.process_group, async_op=True),
                lambda: mine,
            )
        parts = torch.empty_like(x)
        return self._start(
            "reduce_scatter",
            [x],
            lambda: dist.all_to_all_single(parts, x, group=self.process_group, async_op=True),
            lambda: _sum_in_order(parts.chunk(self.size), mine),
        )

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
        return self._start(
            "all_to_all",
            [x],
            lambda: dist.all_to_all_single(found, x, group=self.process_group, async_op=True),
            lambda: found,
        )

    def all_to_all(self, x: torch.Tensor) -> torch.Tensor:
        """(size·n, …) → the same shape: row block i goes to rank i, and block j of the result comes from rank j."""
        return self.start_all_to_all(x).wait()

    def all_to_all_uneven(self, x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """(sum of counts, …), counts[i] rows for rank i → what the ranks had for this one, in rank order."""
        if len(counts) != self.size or sum(counts) != x.shape[0]:
            raise ValueError(f"all_to_all_uneven: counts {list(counts)} for {x.shape[0]} rows and {self.size} ranks")
        if self.size == 1:
            return x
        coming = self.all_to_all(torch.tensor(list(counts), device=x.device)).tolist()
        x, found = x.contiguous(), x.new_empty(sum(coming), *x.shape[1:])
        return self._start(
            "all_to_all",
            [x],
            lambda: dist.all_to_all_single(found, x, coming, list(counts), group=self.process_group, async_op=True),
            lambda: found,
        ).wait()

    def broadcast(self, x: torch.Tensor, source: int = 0) -> torch.Tensor:
        """`x` of the group's rank `source`, into `x` of all."""
        if self.size == 1:
            return x
        return self._start(
            "broadcast",
            [x],
            lambda: dist.broadcast(x, group=self.process_group, group_src=source, async_op=True),
            lambda: x,
        ).wait()

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
        sent = [tensor for tensor, _ in sends]
        return self._start("exchange", sent, lambda: dist.batch_isend_irecv(operations), lambda: received)

    def record_transfer(self, tensor: torch.Tensor, *, source: int, target: int) -> Record:
        """Record that somebody else's code (torch's pipeline schedules) starts to send `tensor` from rank `source` of this
        group to `target`, or to receive it there; this rank is one of the two. Numbered for each pair and direction."""
        ranks = (self.ranks[source], self.ranks[target])
        group = f"{self.name} {ranks[0]}→{ranks[1]}"
        sequence = self.records.latest.get(f"{group}@{ranks[0]}", 0) + 1
        operation = "send" if source == self.rank else RECEIVE
        return self.records.begin(group, sequence, operation, [tensor], ranks)

    # ---- anything else ----

    def gather_objects(self, value: Any) -> list[Any]:
        """The picklable `value` of every rank, in rank order, on all of them. Slow: not for every micro-batch."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with self.records.waits_for(self._begin("gather_objects", [])):
            dist.all_gather_object(found, value, group=self.process_group)
        return found

    def barrier(self) -> None:
        """Wait for every rank of the group."""
        if self.size > 1:
            with self.records.waits_for(self._begin("barrier", [])):
                dist.barrier(group=self.process_group)


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


@contextmanager
def processes(device_type: str, *, size: int, timeout_s: float) -> Iterator[None]:
    """The block has the default process group of `size` processes, as `start_processes` makes it; one process needs none. After it
    no group of this process can be used."""
    if size > 1:
        start_processes(device_type, timeout_s=timeout_s)
    try:
        yield
    except BaseException:
        if dist.is_initialized():
            # Not `_close`: that waits for what is under way, and the ranks it is under way with may be gone.
            dist.destroy_process_group()
        raise
    if dist.is_initialized():
        _close()


def start_processes(device_type: str, *, timeout_s: float) -> None:
    """Set up the default process group from torchrun's variables: nccl on CUDA, gloo on the CPU. For a process that is killed; one
    that ends by itself uses `processes`."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # torch's flight recorder, which reads this when it starts
    backend, timeout = "nccl" if device_type == "cuda" else "gloo", timedelta(seconds=timeout_s)
    store = store_of_torchrun(timeout_s=timeout_s)
    if store is None:
        dist.init_process_group(backend, timeout=timeout)
    else:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def _close() -> None:
    """Torch's groups end, and their threads with them, when nobody holds them any more. A thread of gloo that still has a tensor
    when the interpreter ends aborts the process (pytorch issue 190489): so nothing here holds on to them."""
    dist.destroy_process_group()
    for group in _OPEN:
        object.__setattr__(group, "process_group", None)
    _OPEN.clear()
    gc.collect()  # those in cycles, such as a pipeline's stages


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


# ---- beside the collectives ----


class Board:
    """Short texts under keys that all ranks of the job read and write, without anyone waiting for anyone. For one thread."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store

    def set(self, key: str, text: str) -> None:
        """Write. Raises RuntimeError, as all methods do, if nobody serves the board any more."""
        self._store.set(key, text)

    def get(self, keys: Iterable[str]) -> dict[str, str]:
        """What there is under `keys`."""
        return {key: self._store.get(key).decode() for key in keys if self._store.check([key])}

    def first(self, key: str) -> bool:
        """Whether this is the first call of the whole job for `key`."""
        return self._store.add(key, 1) == 1


def job_board() -> Board:
    """The board of the job, over the store by which its processes found each other. Needs a default process group."""
    shared: Any = dist.distributed_c10d._get_default_store()
    store = shared.clone()  # a connection of its own: the main thread may wait in the store for long
    store.set_timeout(timedelta(seconds=10))
    return Board(dist.PrefixStore("board", store))


def flight_record() -> Any:
    """What torch's flight recorder remembers: the collectives of all process groups, without transfers from rank to rank
    (torch 2.13)."""
    return json.loads(torch._C._distributed_c10d._dump_fr_trace_json())  # type: ignore[attr-defined]
