"""The driver: runs a list of tasks in an executor, skips what is done, retries what was killed, reports what failed."""

from __future__ import annotations

import json
import logging
import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opencoder.console import ProgressBar
from opencoder.errors import DataError, Failure
from opencoder.files import write_json, write_text

from .digests import Digests
from .execute import DISK_FULL, Job, Outcome, failed, remove_leftovers
from .guards import Signals, only_driver
from .local import Executor
from .task import (
    Task,
    check_names,
    code_version,
    failure_path,
    is_done,
    manifest_path,
    stat_digest,
    task_key,
)

log = logging.getLogger("opencoder")
POLL_S = 0.2
"""Longest time a signal waits to be noticed."""


@dataclass
class FailedTask:
    """A task that could not be done."""

    name: str
    error: str
    attempts: int
    log: str
    """File with the traceback and the call."""


@dataclass
class RunReport:
    """What a run did. Names are sorted as the tasks were given."""

    total: int
    skipped: int = 0
    """Done before."""
    done: int = 0
    """Run now, with success."""
    failed: list[FailedTask] = field(default_factory=list)
    blocked: list[str] = field(default_factory=list)
    """Not run: an input's task failed, or the limit of failures was reached."""
    attempts: dict[str, int] = field(default_factory=dict)
    """Tasks that needed more than one attempt."""
    peak_rss_bytes: int = 0
    """Largest resident memory of a worker over the tasks run now."""
    above_stated: list[str] = field(default_factory=list)
    """Tasks whose peak was above the memory they state."""
    wall_s: float = 0.0
    cpu_s: float = 0.0
    """Sum over the tasks run now."""


class TasksFailed(Failure):
    """Some tasks failed; the others are done. `report` has the rest."""

    def __init__(self, report: RunReport) -> None:
        super().__init__(report)
        self.report = report

    def __str__(self) -> str:
        first = self.report.failed[0]
        names = ", ".join(one.name for one in self.report.failed[:5])
        more = f" and {len(self.report.failed) - 5} more" if len(self.report.failed) > 5 else ""
        blocked = f"; {len(self.report.blocked)} not run because of that" if self.report.blocked else ""
        return (
            f"{len(self.report.failed)} of {self.report.total} tasks failed: {names}{more}{blocked}. {first.name}: "
            f"{first.error} (attempts: {first.attempts}; log: {first.log}). What is done is kept: start again to go on"
        )


class DiskFull(Failure):
    """The disk is full; everything written so far is whole."""


def run(
    tasks: Sequence[Task],
    *,
    folder: str | Path,
    executor: Executor,
    label: str = "tasks",
    max_failures: int = 10,
    retries: int = 2,
    verify: bool = False,
    known: Mapping[str, tuple[tuple[str, ...], str, str]] | None = None,
) -> RunReport:
    """Do every task whose result is not in `folder` yet. A task waits for those whose outputs it reads.

    A task that raises fails at once; after `max_failures` of them nothing new is started. One whose process was killed is
    tried again up to `retries` times, the last time with nothing beside it. `verify` hashes the outputs of done tasks and
    their sources instead of trusting size and time. `known` gives (digests, code, key) of tasks by name, where another
    driver has worked them out.

    Raises TasksFailed (with the report), DiskFull, Stopped on SIGTERM, KeyboardInterrupt on Ctrl-C, UserError if another
    driver is at work in the folder, DataError for tasks that cannot be a plan."""
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    check_names(tasks)
    _check_inputs(tasks, folder)
    driver = _Driver(list(tasks), folder, executor, max_failures, retries, verify, dict(known or {}))
    with (
        only_driver(folder, shared=known is not None),
        Signals() as signals,
        ProgressBar(label, total=len(tasks), unit="tasks") as bar,
    ):
        return driver.go(bar, signals)


def _check_inputs(tasks: Sequence[Task], folder: Path) -> None:
    """Raise DataError for an absolute path into the folder: it would hide that its task has to wait for another."""
    inside = f"{folder}{os.sep}"
    for task in tasks:
        for one in task.inputs:
            if one.path.startswith(inside):
                short = one.path.removeprefix(inside)
                raise DataError(
                    f"task {task.name}: input {one.path} lies in the folder of the run: write it as {short}"
                )


class _Driver:
    """One run."""

    def __init__(
        self,
        tasks: list[Task],
        folder: Path,
        executor: Executor,
        max_failures: int,
        retries: int,
        verify: bool,
        known: dict[str, tuple[tuple[str, ...], str, str]],
    ) -> None:
        self.tasks, self.folder, self.executor = tasks, folder, executor
        self.max_failures, self.retries, self.verify, self.known = max_failures, retries, verify, known
        self.report = RunReport(len(tasks))
        self.digests = Digests(folder)
        producer = {path: task.name for task in tasks for path in task.output_paths()}
        self.waits_for = {t.name: {producer[i.path] for i in t.inputs if i.path in producer} for t in tasks}
        self.readers: dict[str, list[Task]] = {}
        for task in tasks:
            for name in self.waits_for[task.name]:
                self.readers.setdefault(name, []).append(task)
        self.ready = deque(task for task in tasks if not self.waits_for[task.name])
        self.alone: deque[Job] = deque()
        self.again: deque[Job] = deque()
        self.running: dict[str, Job] = {}
        self.settled: set[str] = set()
        self.full: str | None = None

    def go(self, bar: ProgressBar, signals: Signals) -> RunReport:
        """Run until nothing is left that can run."""
        start = time.monotonic()
        remove_leftovers(self.folder, self.tasks)
        self.bar = bar
        try:
            while True:
                signals.check()
                if not self._stopping():
                    self._fill(signals)
                if not self.running:
                    if self._stopping() or not (self.ready or self.again or self.alone):
                        break
                    continue
                for outcome in self.executor.wait(POLL_S):
                    self._settle(outcome)
        except BaseException as error:
            self.executor.cancel()
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                self.full = f"the driver ({error})"
            else:
                raise
        self.report.wall_s = time.monotonic() - start
        return self._end()

    def _stopping(self) -> bool:
        return self.full is not None or len(self.report.failed) >= self.max_failures

    def _fill(self, signals: Signals) -> None:
        """Give the executor what it can take. Jobs of the last attempt run with nothing beside them."""
        while len(self.running) < self.executor.capacity:
            signals.check()
            if self.again:
                self._submit(self.again.popleft())
            elif self.ready:
                self._start(self.ready.popleft())
                if self._stopping():
                    return
            else:
                break
        if self.alone and not self.running:
            self._submit(self.alone.popleft())

    def _submit(self, job: Job) -> None:
        self.running[job.task.name] = job
        self.executor.submit(job)

    def _start(self, task: Task) -> None:
        """Skip a task that is done; submit one that is not."""
        try:
            digests, code, key = self.known.get(task.name) or self._identity(task)
        except Exception as error:
            self._fail(failed(Job(str(self.folder), task, (), "", "", 1), error))
            return
        manifest = is_done(self.folder, task, key, verify=self.verify)
        if manifest is not None:
            self.report.skipped += 1
            self._finish(task, manifest)
            return
        manifest_path(self.folder, task.name).unlink(missing_ok=True)
        failure_path(self.folder, task.name).unlink(missing_ok=True)
        self._submit(Job(str(self.folder), task, digests, key, code, 1))

    def _identity(self, task: Task) -> tuple[tuple[str, ...], str, str]:
        digests = tuple(
            stat_digest(self.folder / one.path) if one.by == "stat" else self.digests.of(one.path)
            for one in task.inputs
        )
        code = task.code or code_version(task.function)
        return digests, code, task_key(task, digests, code)

    def _settle(self, outcome: Outcome) -> None:
        job = self.running.pop(outcome.job.task.name)
        if outcome.status == "killed":
            remove_leftovers(self.folder, [job.task])
        if outcome.status == "done":
            measured = outcome.manifest["measured"]
            self.report.done += 1
            self.report.cpu_s += measured["cpu_s"]
            self.report.peak_rss_bytes = max(self.report.peak_rss_bytes, measured["peak_rss_bytes"])
            if job.task.memory is not None and measured["peak_rss_bytes"] > job.task.memory:
                self.report.above_stated.append(job.task.name)
            self._finish(job.task, outcome.manifest)
        elif outcome.disk_full:
            self.full = f"task {job.task.name} ({outcome.error})"
        elif outcome.status == "killed" and not outcome.final and job.attempt <= self.retries:
            log.warning("task %s, attempt %d: %s; trying again", job.task.name, job.attempt, outcome.error)
            again = job._replace(attempt=job.attempt + 1)
            self.report.attempts[job.task.name] = again.attempt
            (self.alone if again.attempt > self.retries else self.again).append(again)
        else:
            self._fail(outcome)

    def _finish(self, task: Task, manifest: dict[str, Any]) -> None:
        for path, facts in manifest["outputs"].items():
            self.digests.produced[path] = facts["sha256"]
        self.settled.add(task.name)
        self.bar.advance()
        for reader in self.readers.get(task.name, []):
            self.waits_for[reader.name].discard(task.name)
            if not self.waits_for[reader.name]:
                self.ready.append(reader)

    def _fail(self, outcome: Outcome) -> None:
        job = outcome.job
        path = self.folder / "logs" / f"{job.task.name}.log"
        write_text(
            path,
            f"task {job.task.name}, attempt {job.attempt}: {outcome.status}\n{outcome.error}\n\n{outcome.traceback}\n"
            f"{json.dumps(job.task.to_json(), indent=2)}\n",
        )
        row = FailedTask(job.task.name, outcome.error, job.attempt, str(path))
        facts = {"key": job.key, "error": outcome.error, "traceback": outcome.traceback, "attempts": job.attempt}
        write_json(failure_path(self.folder, job.task.name), facts)
        self.report.failed.append(row)
        self.settled.add(job.task.name)
        log.error("task %s failed: %s (log: %s)", row.name, row.error, row.log)

    def _end(self) -> RunReport:
        self.report.blocked = [task.name for task in self.tasks if task.name not in self.settled]
        if self.full is not None:
            raise DiskFull(
                f"no space left under {self.folder}: {self.full}. {self.report.done + self.report.skipped} of "
                f"{self.report.total} tasks are done and kept: make room and start again"
            )
        self.digests.save()
        if self.report.failed:
            raise TasksFailed(self.report)
        if self.report.blocked:
            raise DataError(
                f"tasks wait for each other in a circle: {', '.join(self.report.blocked[:5])}; no task may read what "
                "depends on its own output"
            )
        return self.report
