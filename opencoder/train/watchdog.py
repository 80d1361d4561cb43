"""Ends a job in which a rank hangs or is gone, on all ranks within seconds, with one line that names it.

A thread of each rank beats: it writes to the job's board (parallel/group.py) where its rank is, in the order of each group,
and what it waits for. A rank that has waited longer than `train.timeout_s` reads where the others are, follows who waits for
whom to a rank that waits for nobody, and tells all to stop. They write what they remember to RUN/hang/rank_R.json."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from opencoder.errors import Failure, UserError
from opencoder.files import write_json
from opencoder.parallel.group import Board, flight_record, job_board
from opencoder.parallel.mesh import Mesh
from opencoder.parallel.records import CommunicationError, Record, reason_of

BEATS_PER_TIMEOUT = 20
LONGEST_INTERVAL_S = 2.0
GRACE_S = 10.0
"""How long a rank may still run after another has ended with an error: it may be about to end with the same."""
NAMES = 8
"""Ranks that a message lists at most."""


class Beat(NamedTuple):
    """Where a rank is."""

    number: int
    step: int
    latest: dict[str, int]
    """`Record.key` → number of the last one begun."""
    waiting: dict[str, Any] | None
    """The record that its host waits for: what (as text), key, sequence, ranks."""
    idle_s: float
    """Since it last began or ended anything."""


class Watchdog:
    """That of one rank. `start` it, `stop` it; `ended_with` an error, it finds out whose it was."""

    def __init__(self, mesh: Mesh, board: Board, *, timeout_s: float, folder: Path, on_cuda: bool = False) -> None:
        """`folder` is for what is remembered of a hang. `on_cuda`: the host does not wait for collectives, so a rank that
        does nothing at all for `timeout_s` is taken for one that waits."""
        self.world, self.records, self.board = mesh.world, mesh.records, board
        self.timeout_s, self.folder, self.on_cuda = timeout_s, folder, on_cuda
        self.interval_s = min(LONGEST_INTERVAL_S, timeout_s / BEATS_PER_TIMEOUT)
        self._beats = 0
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """From now on the rank beats."""
        self._thread.start()

    def stop(self) -> None:
        """The rank has ended."""
        self._stopped.set()
        self._thread.join()

    # ---- the thread ----

    def _watch(self) -> None:
        told_to_stop_at: float | None = None
        while not self._stopped.wait(self.interval_s):
            try:
                with self._lock:
                    self._beat()
                    notice = self.board.get(["stop"]).get("stop")
                    waiting = self._overdue()
                    if waiting is not None and notice is None and self.board.first("told"):
                        self._tell_of_hang(waiting)
                        notice = json.dumps({"grace_s": 0.0})
            except RuntimeError as error:
                # Who serves the board is gone, and so will this rank be: what it waits for breaks off, or waits too long.
                if (waiting := self._overdue()) is not None:
                    self._leave(f"{self._waited(waiting)}; where the others are is not known ({reason_of(error)})")
                continue
            if notice is not None:
                told_to_stop_at = told_to_stop_at or time.monotonic()
                if time.monotonic() - told_to_stop_at >= json.loads(notice)["grace_s"]:
                    self._leave(None)

    def _beat(self) -> None:
        self._beats += 1
        record = self.records.waiting
        waiting = None
        if record is not None:
            waiting = {"what": str(record), "key": record.key, "sequence": record.sequence, "ranks": record.ranks}
        idle_s = time.monotonic() - self.records.touched
        beat = Beat(self._beats, self.records.step, dict(self.records.latest), waiting, idle_s)
        self.board.set(f"beat/{self.world.rank}", json.dumps(beat._asdict()))

    def _overdue(self) -> Record | None:
        """What this rank has waited for longer than it may."""
        record = self.records.waiting
        if record is None and self.on_cuda:
            record = next(iter(self.records.recent()[-1:]), None)
        return record if time.monotonic() - self.records.touched > self.timeout_s else None

    def _tell_of_hang(self, record: Record) -> None:
        beats = self._read_beats()
        text = f"{self._waited(record)}; {blame(self.world.rank, _facts(record), beats)}. See {self.folder}/rank_*.json"
        _print(text)
        self.board.set("stop", json.dumps({"text": text, "grace_s": 0.0}))

    def _waited(self, record: Record) -> str:
        waited_s = time.monotonic() - self.records.touched
        return f"rank {self.world.rank} has waited {waited_s:.1f} s (train.timeout_s={self.timeout_s:g}) in {record}"

    def _read_beats(self) -> dict[int, Beat]:
        found = self.board.get(f"beat/{rank}" for rank in range(self.world.size))
        return {int(key.removeprefix("beat/")): Beat(**json.loads(text)) for key, text in found.items()}

    def _leave(self, text: str | None) -> None:
        """End this process from its watchdog's thread: the main thread may never come back."""
        if text is not None:
            _print(text)
        try:
            self.dump()
        except OSError as error:
            _print(f"rank {self.world.rank}: no record of the hang could be written to {self.folder}: {error}")
        # torchrun ends all when one is gone: the others need a moment to write theirs.
        time.sleep(2 * self.interval_s + 0.5)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)

    def dump(self) -> None:
        """Write what this rank remembers: its collectives, torch's flight record, and where its threads are."""
        now = time.monotonic()
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        rows = [
            {
                "what": str(r),
                **{
                    name: getattr(r, name)
                    for name in ("group", "operation", "sequence", "step", "ranks", "shape", "bytes")
                },
                "started_s_ago": now - r.started,
                "took_s": None if r.finished is None else r.finished - r.started,
            }
            for r in self.records.recent()
        ]
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(
            self.folder / f"rank_{self.world.rank}.json",
            {
                "rank": self.world.rank,
                "host": socket.gethostname(),
                "step": self.records.step,
                "waits_for": None if self.records.waiting is None else str(self.records.waiting),
                "stacks": {
                    names.get(number, str(number)): traceback.format_stack(frame)
                    for number, frame in sys._current_frames().items()
                },
                "records": rows,
                "flight_recorder": flight_record(),
            },
        )

    # ---- how a rank ends ----

    def ended_with(self, error: BaseException) -> BaseException:
        """What this rank is to raise instead of `error`, so that the job tells its cause once."""
        with self._lock:
            try:
                return self._settled(error)
            except RuntimeError:
                return (
                    error  # nobody serves the board any more, so nothing can be settled: better told twice than never
                )

    def _settled(self, error: BaseException) -> BaseException:
        if isinstance(error, CommunicationError):
            return self._broke_off(error)
        # Of an error that all raise alike, the rank that comes first tells.
        if not getattr(error, "told_elsewhere", False):
            if not self.board.first("told"):
                _tell_elsewhere(error)
            else:
                text = f"rank {self.world.rank}: {type(error).__name__}: {error}"
                self.board.set("stop", json.dumps({"text": text, "grace_s": GRACE_S}))
        return error

    def _broke_off(self, error: CommunicationError) -> Failure:
        before = self._read_beats()
        for _ in range(3):
            time.sleep(self.interval_s)
            self._beat()
            if self.board.get(["stop"]):
                break
        after = self._read_beats()
        gone = [rank for rank in before if rank != self.world.rank and after[rank].number == before[rank].number]
        if not self.board.first("told"):
            error.told_elsewhere = True
            return error
        named = f"{_ranks(gone)} gone (killed, out of memory, or without network): " if gone else ""
        failure = Failure(f"{named}on rank {self.world.rank}, {error}")
        self.board.set("stop", json.dumps({"text": str(failure), "grace_s": GRACE_S}))
        return failure


def blame(rank: int, waiting: dict[str, Any], beats: dict[int, Beat]) -> str:
    """Who is behind, as seen by `rank`, which waits for `waiting`; if that one waits for a third, that one too, and so on."""
    parts: list[str] = []
    seen = {rank}
    ahead = [waiting]
    while ahead:
        now = ahead.pop(0)
        late = [r for r in now["ranks"] if r not in seen and (r not in beats or _at(beats[r], now) < now["sequence"])]
        seen.update(late)
        for r in late[:NAMES]:
            beat = beats.get(r)
            if beat is None:
                parts.append(f"rank {r} has never come")
            elif beat.waiting is not None:
                parts.append(f"rank {r} is at #{_at(beat, now)}, itself in {beat.waiting['what']}")
                ahead.append(beat.waiting)
            else:
                parts.append(
                    f"rank {r} is behind, at #{_at(beat, now)}, step {beat.step}, and for {beat.idle_s:.1f} s in no collective"
                )
        if len(late) > NAMES:
            parts.append(f"{len(late) - NAMES} more of {now['key']} likewise")
    if not parts:
        return "every other rank has begun it too, so what hangs is the network, or ranks call different collectives"
    return "; ".join(parts)


def _at(beat: Beat, waiting: dict[str, Any]) -> int:
    return beat.latest.get(waiting["key"], 0)


def _facts(record: Record) -> dict[str, Any]:
    return {"key": record.key, "sequence": record.sequence, "ranks": record.ranks}


def _ranks(ranks: list[int]) -> str:
    named = ", ".join(str(rank) for rank in ranks[:NAMES]) + (" and more" if len(ranks) > NAMES else "")
    return f"rank {named} is" if len(ranks) == 1 else f"ranks {named} are"


def _tell_elsewhere(error: BaseException) -> None:
    if isinstance(error, (Failure, UserError)):
        error.told_elsewhere = True


def _print(text: str) -> None:
    print(f"failed: {text}", file=sys.stderr, flush=True)


@contextmanager
def watched(mesh: Mesh, *, timeout_s: float, run_dir: Path, on_cuda: bool) -> Iterator[None]:
    """The block is the work of this rank: it is ended when another hangs or is gone, and an error is told once in the job."""
    if mesh.world.size == 1:
        yield
        return
    dog = Watchdog(mesh, job_board(), timeout_s=timeout_s, folder=run_dir / "hang", on_cuda=on_cuda)
    dog.start()
    try:
        yield
    except BaseException as error:
        # torchrun sends this to all when one is gone. This rank is about to end anyhow, and may be the one that tells why.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        settled = dog.ended_with(error)
        if settled is error:
            raise
        raise settled from error
    finally:
        dog.stop()
