"""What a pipeline's stages on one rank send and receive, put into the records of its group.

torch's schedules make the transfers and wait for them; all that can be seen is when a stage is asked for them and when it
computes. Between two computations a rank does nothing but wait for a transfer."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .group import Group
from .records import CommunicationError, Record

FORWARD, BACKWARD = "forward", "backward"
Work = tuple[int, str, int]
"""Stage, FORWARD or BACKWARD, micro-batch."""


class Transfers:
    """Those of one `Pipeline.run` after another, which calls `begin` and `end`; stages call the rest."""

    def __init__(self, pp: Group) -> None:
        self.pp = pp
        self._expected: dict[Work, Record] = {}
        """Receives that are under way, in the order in which they were asked for, by what needs them."""
        self._sent: list[Record] = []
        """Sends that may be under way."""
        self._idle_since: float | None = None

    def begin(self) -> None:
        """A run starts."""
        self._expected.clear()
        self._sent.clear()
        self._idle_since = time.monotonic()

    def end(self) -> None:
        """All is sent and received."""
        self._stop_waiting(self._sent.pop() if self._sent else None)
        self._idle_since = None

    def receive(self, work: Work, operations: Sequence[Any]) -> None:
        """`operations` (torch's P2POp, at most one) start, and `work` needs what they bring."""
        for operation in operations:
            self._expected[work] = self.pp.record_transfer(
                operation.tensor, source=operation.group_peer, target=self.pp.rank
            )
        self._tell()

    def send(self, operations: Sequence[Any]) -> None:
        """`operations` start."""
        for operation in operations:
            record = self.pp.record_transfer(operation.tensor, source=self.pp.rank, target=operation.group_peer)
            if self._sent:  # whether an earlier one has gone is not told: the newest stands for all
                self.pp.records.end(self._sent.pop(), 0.0)
            self._sent.append(record)
        self._tell()

    @contextmanager
    def compute(self, work: Work | None = None) -> Iterator[None]:
        """The block is work of a stage; what it needs is at hand."""
        self._stop_waiting(self._expected.pop(work, None) if work else None)
        self._idle_since = None
        yield
        self._idle_since = time.monotonic()
        self._tell()

    @property
    def awaited(self) -> Record | None:
        """What the host may be waiting for."""
        if self._idle_since is None:
            return None
        return next(iter(self._expected.values()), None) or (self._sent[-1] if self._sent else None)

    def _tell(self) -> None:
        if (awaited := self.awaited) is not None:
            self.pp.records.wait(awaited)

    def _stop_waiting(self, record: Record | None) -> None:
        """The host goes on, now that `record`, if any, has come."""
        waited_s = time.monotonic() - self._idle_since if self._idle_since is not None else 0.0
        if record is not None:
            self.pp.records.end(record, waited_s)
        else:  # it may have waited for something that it sent
            self.pp.records.wait(None)
            self.pp.records.blocked_s += waited_s


def communication_error(error: BaseException, transfers: Transfers) -> CommunicationError | None:
    """What `error`, caught around a schedule, says of communication: what a stage met with in its work, or a transfer that
    broke off; None if it is another error."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, CommunicationError):
            return cause
        cause = cause.__cause__
    awaited = transfers.awaited
    return None if awaited is None else CommunicationError(awaited, error)
