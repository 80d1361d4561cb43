"""The executor `array`: the driver writes a list of tasks, the elements of a job array (Slurm or any other) do their shares
of it, and the driver collects what they leave in the folder.

FOLDER/tasks.jsonl holds one wave: tasks none of which reads what another of them writes. Its first line counts them, each
other line is one task with its digests, code version and key. Element i of N does lines i, i+N, i+2N, …"""

from __future__ import annotations

import json
import logging
import os
import shlex
import subprocess
import time
from pathlib import Path
from typing import Any

from opencoder.errors import DataError, UserError
from opencoder.files import atomic_open

from .driver import RunReport, run
from .execute import Job, Outcome
from .local import LocalExecutor
from .task import FORMAT, Task, failure_path, manifest_path, read_manifest

log = logging.getLogger("opencoder")
TASKS = "tasks.jsonl"


class ArrayExecutor:
    """Runs jobs wave by wave through `command`, a shell command in which {folder} and {count} are filled in and which
    returns once every element of the array has ended, for Slurm:

    sbatch --wait --array=0-63 --wrap 'opencoder run-tasks {folder} --index $SLURM_ARRAY_TASK_ID --count {count}'

    Without a command, the driver says what to run and waits for the results. Tasks that the command left without a result
    count as killed; without a command nobody can tell, and the driver waits on until it is stopped."""

    capacity = 1 << 30

    def __init__(self, *, count: int, command: str | None = None, poll_s: float = 2.0) -> None:
        if count < 1:
            raise ValueError(f"count={count} must be at least 1")
        self.count, self.command, self.poll_s = count, command, poll_s
        self._queued: list[Job] = []
        self._wave: dict[str, Job] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._looked = 0.0

    def __enter__(self) -> ArrayExecutor:
        return self

    def __exit__(self, *exc: object) -> None:
        self.cancel()

    def submit(self, job: Job) -> None:
        """Keep a job for the next wave."""
        self._queued.append(job)

    def wait(self, timeout_s: float) -> list[Outcome]:
        """Outcomes of the wave that is under way; starts the next when that one is over."""
        if not self._wave and self._queued:
            self._launch()
        ended = self._process is not None and self._process.poll() is not None
        wait_s = self._looked + self.poll_s - time.monotonic()
        if wait_s > 0 and not ended:  # a folder may be large, and its server far
            time.sleep(min(timeout_s, wait_s))
            return []
        found = self._collect()
        if ended:  # asked before collecting, so that nothing written by then is missed
            assert self._process is not None
            text = f"the array ended (exit status {self._process.returncode}) without a result of this task"
            found += [Outcome(job, "killed", error=text) for job in self._wave.values()]
            self._wave.clear()
        if not self._wave:
            self._process = None
        self._looked = time.monotonic()
        return found

    def _launch(self) -> None:
        jobs, self._queued = self._queued, []
        folder = Path(jobs[0].folder)
        self._wave = {job.task.name: job for job in jobs}
        with atomic_open(folder / TASKS) as file:
            file.write(json.dumps({"format": FORMAT, "tasks": len(jobs)}) + "\n")
            for job in jobs:
                line = {"task": job.task.to_json(), "digests": job.digests, "code": job.code, "key": job.key}
                file.write(json.dumps(line) + "\n")
        if self.command is None:
            log.warning(
                "%d tasks are listed in %s: run `opencoder run-tasks %s --index I --count %d` for every I from 0 to %d",
                len(jobs), folder / TASKS, shlex.quote(str(folder)), self.count, self.count - 1,
            )  # fmt: skip
            return
        command = self.command.replace("{folder}", shlex.quote(str(folder))).replace("{count}", str(self.count))
        self._process = subprocess.Popen(command, shell=True, start_new_session=True)

    def _collect(self) -> list[Outcome]:
        found = []
        present: dict[Path, set[str]] = {}  # one listing per folder instead of two look-ups per task
        for name, job in list(self._wave.items()):
            path = manifest_path(Path(job.folder), name)
            if path.parent not in present:
                present[path.parent] = set(os.listdir(path.parent)) if path.parent.is_dir() else set()
            if not {path.name, failure_path(Path(job.folder), name).name} & present[path.parent]:
                continue
            manifest = read_manifest(Path(job.folder), name)
            if manifest is not None and manifest["key"] == job.key:
                found.append(Outcome(job, "done", manifest=manifest))
            elif (failure := _read_failure(Path(job.folder), name)) is not None and failure["key"] == job.key:
                found.append(Outcome(job, "failed", error=failure["error"], traceback=failure["traceback"]))
            else:
                continue
            del self._wave[name]
        return found

    def cancel(self) -> None:
        """End the command. Elements that a scheduler has started already end with their shares."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait()
        self._wave.clear()
        self._queued.clear()


def _read_failure(folder: Path, name: str) -> dict[str, Any] | None:
    try:
        found = json.loads(failure_path(folder, name).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def read_tasks(folder: Path) -> list[Job]:
    """The jobs listed in FOLDER/tasks.jsonl. Raises DataError with the line that is wrong."""
    path = folder / TASKS
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): a run with executor=array writes it") from error
    jobs = []
    for number, line in enumerate(lines, 1):
        try:
            plain = json.loads(line)
            if number == 1:
                count, version = plain["tasks"], plain["format"]
                continue
            task = Task.from_json(plain["task"])
            jobs.append(Job(str(folder), task, tuple(plain["digests"]), plain["key"], plain["code"], 1))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}, line {number} is not a task: {error}") from error
    if not lines or version != FORMAT:
        raise DataError(f"{path} is empty or of another version: write it again with this version of opencoder")
    if len(jobs) != count:
        raise DataError(f"{path} lists {len(jobs)} tasks and says {count}: it was cut off or edited")
    return jobs


def run_share(
    folder: str | Path,
    index: int,
    count: int,
    *,
    workers: int = 1,
    memory_per_worker: int | None = None,
    max_failures: int = 10,
    retries: int = 2,
) -> RunReport:
    """Do share `index` of `count` of the tasks listed in FOLDER/tasks.jsonl, in `workers` processes of this machine.

    Raises what `run` raises; UserError for an index that is not below count."""
    if count < 1 or not 0 <= index < count:
        raise UserError(f"--index {index} --count {count}: the index must be from 0 to count − 1, and count at least 1")
    folder = Path(folder).absolute()
    jobs = read_tasks(folder)[index::count]
    known = {job.task.name: (job.digests, job.code, job.key) for job in jobs}
    with LocalExecutor(workers, memory_per_worker=memory_per_worker) as executor:
        return run(
            [job.task for job in jobs],
            folder=folder,
            executor=executor,
            label=f"share {index}/{count}",
            max_failures=max_failures,
            retries=retries,
            known=known,
        )
