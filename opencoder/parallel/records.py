"""What one rank has communicated: every collective and transfer with its place in the order of its group, so that a rank
that hangs can be named, and totals, so that what communication costs can be told."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from opencoder.errors import Failure

Result = TypeVar("Result")
RECEIVE = "receive"
"""Operation of a record that hands nothing over: the other side's send counts."""


@dataclass(slots=True)
class Record:
    """One collective of this rank, or one tensor that it sends to or receives from another."""

    sequence: int
    """Number within its group, from 1: the ranks of a group are at the same number, or one of them is behind."""
    group: str
    """Name of the group: its axes."""
    operation: str
    shape: tuple[int, ...]
    bytes: int
    """What this rank handed over, or received with RECEIVE."""
    step: int
    """Optimizer step under way, as told to `Records.step`."""
    started: float
    """time.monotonic() at the call."""
    finished: float | None = None
    """time.monotonic() when its result was at hand; None while it is under way."""
    ranks: tuple[int, ...] = ()
    """Ranks of the world that take part, this one among them."""

    @property
    def key(self) -> str:
        """Names the group among all groups of the job, the same on all its ranks: groups of one name have no rank in common."""
        return f"{self.group}@{self.ranks[0]}" if self.ranks else self.group

    def __str__(self) -> str:
        return f"{self.operation} #{self.sequence} over {self.group} at step {self.step}"


class CommunicationError(Failure):
    """A collective that broke off, because another rank is gone or did not come in time."""

    def __init__(self, record: Record, cause: BaseException) -> None:
        super().__init__(f"{record} broke off: {reason_of(cause)}")
        self.record = record


def reason_of(cause: BaseException) -> str:
    """The first sentence of an error; gloo's begin with a place in its source and end with good wishes."""
    text = re.sub(r"^\[\S*\]\s*", "", str(cause).strip())
    return re.split(r"\. |\n", text)[0] or type(cause).__name__


class Totals(NamedTuple):
    """What communication came to since the last `Records.take`."""

    collectives: int
    """Transfers from rank to rank included."""
    bytes: int
    """Handed over by this rank."""
    blocked_s: float
    """Host time spent waiting. On CUDA the host does not wait for a collective, so this says nothing there."""


class Records:
    """The last `capacity` collectives of this rank over all groups of its mesh, and totals.

    One thread communicates; others may read `recent`, `unfinished`, `latest` and `waiting` at any time."""

    def __init__(self, capacity: int = 1024) -> None:
        self.step = 0
        """Set by the training loop; written into every record."""
        self.latest: dict[str, int] = {}
        """`Record.key` → number of the last one begun."""
        self.waiting: Record | None = None
        """What the host waits for."""
        self.touched = time.monotonic()
        """When something last began, was waited for or ended."""
        self.blocked_s = 0.0
        """Host time spent waiting, ever."""
        self._ring: list[Record | None] = [None] * capacity
        self._next = 0
        self._collectives = self._bytes = 0
        self._taken_s = 0.0

    def begin(
        self, group: str, sequence: int, operation: str, tensors: Sequence[torch.Tensor], ranks: tuple[int, ...] = ()
    ) -> Record:
        """A collective starts."""
        size = sum(t.numel() * t.element_size() for t in tensors)
        shape = tuple(tensors[0].shape) if tensors else ()
        self.touched = time.monotonic()
        record = Record(sequence, group, operation, shape, size, self.step, self.touched, ranks=ranks)
        self.latest[record.key] = sequence
        self._ring[self._next % len(self._ring)] = record
        self._next += 1
        self._collectives += 1
        self._bytes += 0 if operation == RECEIVE else size
        return record

    def wait(self, record: Record | None) -> None:
        """From now on the host waits for `record`; None: for nothing."""
        self.waiting, self.touched = record, time.monotonic()

    def end(self, record: Record, blocked_s: float) -> None:
        """Its result is at hand, after waiting `blocked_s` for it."""
        record.finished = self.touched = time.monotonic()
        self.waiting = None
        self.blocked_s += blocked_s

    @contextmanager
    def waits_for(self, record: Record) -> Iterator[None]:
        """The block waits for `record` and ends when its result is at hand. Raises CommunicationError if it breaks off."""
        self.wait(record)
        start = self.touched
        try:
            yield
        except RuntimeError as error:  # what torch raises for a time-out, a closed connection and the like
            self.wait(None)
            raise CommunicationError(record, error) from error
        self.end(record, time.monotonic() - start)

    def recent(self) -> list[Record]:
        """What is remembered, oldest first."""
        ring, at = list(self._ring), self._next % len(self._ring)
        return [record for record in ring[at:] + ring[:at] if record is not None]

    def unfinished(self) -> list[Record]:
        """Collectives under way, oldest first."""
        return [record for record in self.recent() if record.finished is None]

    def take(self) -> Totals:
        """Totals since the last call; they start again from 0."""
        totals = Totals(self._collectives, self._bytes, self.blocked_s - self._taken_s)
        self._collectives = self._bytes = 0
        self._taken_s = self.blocked_s
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
        """The result; on CUDA the current stream waits, not the host. May be called again. Raises CommunicationError if
        another rank is gone or does not come in time."""
        if not self._result:
            if self._record is not None and self._records is not None:
                with self._records.waits_for(self._record):
                    for work in self._works:
                        work.wait()
            result = self._finish()
            self._result.append(result)
            self._works, self._finish = (), lambda: result  # what they held is free, also while this handle is kept
        return self._result[0]
