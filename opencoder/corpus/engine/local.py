"""The executor `local`: processes of this machine, one task at a time each.

Why not ProcessPoolExecutor: when one of its workers is killed it gives up all of them and cannot say which task was at
fault. Here the driver knows what each worker runs, replaces the one that ended and leaves the others alone."""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from . import memory
from .execute import Job, Outcome, execute

log = logging.getLogger("opencoder")
WATCH_S = 0.1
"""Seconds between two looks at the memory of the workers."""
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_PR_SET_PDEATHSIG = 1


class Executor(Protocol):
    """Where tasks run. The driver submits up to `capacity` jobs and waits for outcomes, in any order."""

    capacity: int

    def submit(self, job: Job) -> None:
        """Start a job, or queue it."""

    def wait(self, timeout_s: float) -> list[Outcome]:
        """Outcomes that have come in, as soon as there is one or after `timeout_s`."""

    def cancel(self) -> None:
        """End everything that runs, without outcomes."""


class LocalExecutor:
    """Runs jobs in `workers` processes started by spawn, which live on from run to run. Use as a context manager.

    A worker whose resident memory exceeds `memory_per_worker` bytes (default: `memory.default_limit`) is killed. One that
    still holds more than half of it after a task is replaced, so that what one task left behind is not counted against the
    next. The whole stays below driver + workers · memory_per_worker, but for what a task can allocate in WATCH_S."""

    def __init__(self, workers: int, *, memory_per_worker: int | None = None) -> None:
        if workers < 1:
            raise ValueError(f"workers={workers} must be at least 1")
        if memory_per_worker is not None and memory_per_worker < 1:
            raise ValueError(f"memory_per_worker={memory_per_worker} must be at least 1 byte")
        self.capacity = workers
        self.memory_per_worker = memory_per_worker or memory.default_limit(workers)
        if memory_per_worker is None and workers * self.memory_per_worker > memory.available_memory():
            log.warning(
                "%d workers may use %d MiB each, more than the %d MiB available: take fewer workers",
                workers, self.memory_per_worker >> 20, memory.available_memory() >> 20,
            )  # fmt: skip
        self._workers: list[_Worker] = []
        self._watched = 0.0

    def __enter__(self) -> LocalExecutor:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def submit(self, job: Job) -> None:
        """Start a job. There must be fewer than `capacity` unfinished ones."""
        worker = next((w for w in self._workers if w.job is None), None)
        if worker is None:
            assert len(self._workers) < self.capacity, (len(self._workers), self.capacity)
            worker = _Worker()
            self._workers.append(worker)
        worker.start(job)

    def wait(self, timeout_s: float) -> list[Outcome]:
        """Outcomes that have come in; looks after the workers' memory while it waits."""
        busy = [w for w in self._workers if w.job is not None]
        ends: list[Any] = [end for w in busy for end in (w.connection, w.process.sentinel)]
        ready = set(wait(ends, min(timeout_s, WATCH_S)))
        self._watch(busy)
        found = []
        for worker in busy:
            if worker.connection in ready or worker.process.sentinel in ready:
                outcome, alive = worker.take(self.memory_per_worker)
                found.append(outcome)
                if not alive:
                    self._workers.remove(worker)
        return found

    def _watch(self, busy: list[_Worker]) -> None:
        now = time.monotonic()
        if now - self._watched < WATCH_S:
            return
        self._watched = now
        for worker in busy:
            used = memory.rss_of(worker.process.pid or 0)
            if used > self.memory_per_worker and not worker.over:
                worker.over = used
                worker.process.kill()

    def cancel(self) -> None:
        """Kill the workers."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.connection.close()
        self._workers = []

    def close(self) -> None:
        """Let idle workers end; kill those that still run something."""
        for worker in self._workers:
            if worker.job is None:
                worker.stop()
        self._workers = [w for w in self._workers if w.job is not None]
        self.cancel()


class _Worker:
    """One process and what it is doing."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, os.getpid()), daemon=True)
        with _one_thread():
            self.process.start()
        theirs.close()
        self.job: Job | None = None
        self.over = 0
        self.fresh = True

    def start(self, job: Job) -> None:
        self.job, self.over = job, 0
        try:
            self.connection.send(job)
        except OSError:
            return  # it has died: the sentinel says so, and `take` how

    def take(self, limit: int) -> tuple[Outcome, bool]:
        """The outcome of the job, and whether the process can take another."""
        job = self.job
        assert job is not None
        self.job = None
        fresh, self.fresh = self.fresh, False
        try:
            if self.connection.poll():
                outcome: Outcome = self.connection.recv()
                if memory.rss_of(self.process.pid or 0) > limit // 2:
                    self.stop()
                    return outcome, False
                return outcome, True
        except (EOFError, OSError):
            pass  # it ended before or while it answered
        self.process.join()
        self.connection.close()
        if self.over:
            text = f"used {self.over >> 20} MiB, more than the {limit >> 20} MiB a worker may use"
            return Outcome(job, "killed", error=text, final=fresh), False
        return Outcome(job, "killed", error=_how_it_ended(self.process.exitcode)), False

    def stop(self) -> None:
        """End an idle process."""
        try:
            self.connection.send(None)
        except OSError:
            self.process.kill()
        self.process.join(5)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        self.connection.close()


def _how_it_ended(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        hint = " (by hand, or by the system because memory ran out)" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{hint}"
    return f"its process ended by itself with exit status {exitcode}"


@contextmanager
def _one_thread() -> Iterator[None]:
    """Processes started inside use one thread each: there is one of them per core."""
    before = {name: os.environ.get(name) for name in (*_THREADS, "TOKENIZERS_PARALLELISM")}
    os.environ.update(dict.fromkeys(_THREADS, "1"), TOKENIZERS_PARALLELISM="false")
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _serve(connection: Connection, driver: int) -> None:
    """The life of a worker: jobs in, outcomes out, until the driver says None or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the driver decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.dup2(2, 1)  # the driver's stdout holds results only
    if sys.platform == "linux":
        # A worker must not go on writing after its driver was killed. Older than the driver's death: see getppid.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != driver:
            return
    while True:
        try:
            job = connection.recv()
        except (EOFError, OSError):
            return
        if job is None:
            return
        connection.send(execute(job))
