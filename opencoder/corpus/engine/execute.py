"""Running one task in this process: verify the inputs, call the function, put the outputs in place, write the manifest.

Every executor ends here, so what a task does cannot depend on where it runs.

Files are renamed into place, so a kill leaves no half of one under its name. They are not synced one by one: with a disk
that takes 8 ms for it, two per task would cost more than the rest of the engine. What a power failure can take is noticed
instead: a task of an earlier boot of this machine counts as done only if the SHA-256 of its outputs is as recorded."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from opencoder.errors import DataError, Failure
from opencoder.files import sha256_of

from . import memory
from .task import (
    DamagedFile,
    Input,
    Task,
    boot_id,
    code_version,
    failure_path,
    resolve,
    stat_digest,
    write_manifest,
)

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_STALE_S = 24 * 3600.0


class Job(NamedTuple):
    """A task that is to run, with what the driver has worked out about it."""

    folder: str
    task: Task
    digests: tuple[str, ...]
    key: str
    code: str
    attempt: int


@dataclass(frozen=True)
class Outcome:
    """What became of one attempt. done: outputs and manifest are there; failed: the function raised; killed: the process
    that ran it ended."""

    job: Job
    status: Literal["done", "failed", "killed"]
    manifest: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    traceback: str = ""
    disk_full: bool = False
    final: bool = False
    """killed: another attempt would end the same way."""


def execute(job: Job) -> Outcome:
    """Run a task here. Whatever it raises becomes an Outcome; only what must end the process passes through."""
    try:
        return Outcome(job, "done", manifest=_run(job))
    except Exception as error:
        return failed(job, error)


def failed(job: Job, error: Exception) -> Outcome:
    """The outcome of a task that raised."""
    text = f"{type(error).__name__}: {error}"
    full = isinstance(error, OSError) and error.errno in DISK_FULL
    return Outcome(job, "failed", error=text, traceback=traceback.format_exc(), disk_full=full)


def _run(job: Job) -> dict[str, Any]:
    folder, task = Path(job.folder), job.task
    if task.code is None and (mine := code_version(task.function)) != job.code:
        raise Failure(f"the code here ({mine}) is not the driver's ({job.code}): install the same version everywhere")
    precise = memory.reset_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    inputs = [folder / one.path for one in task.inputs]
    check_inputs(task.inputs, inputs, job.digests)
    scratch = scratch_folder(folder, task)
    shutil.rmtree(scratch, ignore_errors=True)  # of a dead process that had our number
    scratch.mkdir(parents=True)
    try:
        temporary = [scratch / Path(path).name for path in task.output_paths()]
        result = resolve(task.function)(inputs, temporary, **dict(task.parameters))
        read = _inputs_read(task, inputs, job.digests)
        outputs, mtimes = _publish(folder, task, temporary)
        failure_path(folder, task.name).unlink(missing_ok=True)
        measured = {
            "mtime_ns": mtimes,
            "wall_s": round(time.perf_counter() - wall, 6),
            "cpu_s": round(time.process_time() - cpu, 6),
            "peak_rss_bytes": memory.peak_rss(),
            "peak_is_of": "task" if precise else "process",
            "attempt": job.attempt,
            "host": socket.gethostname(),
            "boot": boot_id(),
        }
        facts = {
            "key": job.key,
            "code": job.code,
            "parameters": dict(task.parameters),
            "inputs": read,
            "outputs": outputs,
            "result": result,
            "memory_stated": task.memory,
            "measured": measured,
        }
        return write_manifest(folder, task, facts, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_inputs(inputs: Sequence[Input], paths: Sequence[Path], digests: Sequence[str]) -> None:
    """Raise DamagedFile or DataError if an input is not what the key was made from."""
    for one, path, digest in zip(inputs, paths, digests, strict=True):
        if one.by == "stat":
            if stat_digest(path) != digest:
                raise DataError(f"{path} changed since the run began: start again when it is at rest")
        elif one.verify and (found := sha256_of(path)) != digest:
            raise DamagedFile(path, f"SHA-256 {found[:16]}… instead of {digest[:16]}…")


def _inputs_read(task: Task, paths: Sequence[Path], digests: Sequence[str]) -> list[dict[str, Any]]:
    """What the manifest says of the inputs. Those known by size and time are hashed now, while they are in memory, so that
    `verify` can compare later; DataError if one changed during the task."""
    read = []
    for one, path, digest in zip(task.inputs, paths, digests, strict=True):
        read.append({"path": one.path, "digest": digest})
        if one.by == "stat":
            if one.verify:
                read[-1]["sha256"] = sha256_of(path)
            if stat_digest(path) != digest:
                raise DataError(f"{path} changed while task {task.name} read it: start again when it is at rest")
    return read


def _publish(folder: Path, task: Task, temporary: list[Path]) -> tuple[dict[str, Any], dict[str, int]]:
    """Hash and rename the finished outputs; sizes and hashes, and modification times."""
    outputs: dict[str, Any] = {}
    mtimes: dict[str, int] = {}
    for path, written in zip(task.output_paths(), temporary, strict=True):
        if not written.is_file():
            raise Failure(f"task {task.name} ended without writing {written.name}")
        status = written.stat()
        outputs[path] = {"size": status.st_size, "sha256": sha256_of(written)}
        mtimes[path] = status.st_mtime_ns
    for path, written in zip(task.output_paths(), temporary, strict=True):
        os.replace(written, folder / path)
    return outputs, mtimes


# ---- scratch folders ----


def scratch_folder(folder: Path, task: Task) -> Path:
    """Beside the outputs, so that a rename moves them; its name says which process owns it."""
    at = folder / task.name
    return at.with_name(f".{at.name}.{socket.gethostname()}.{os.getpid()}.tmp")


def remove_leftovers(folder: Path, tasks: Sequence[Task]) -> None:
    """Remove scratch folders of processes that are gone: those of this machine whose process has ended, and those of
    others after a day."""
    mine = socket.gethostname()
    for parent in {(folder / task.name).parent for task in tasks}:
        if not parent.is_dir():
            continue
        with os.scandir(parent) as entries:
            found = [e for e in entries if e.name.startswith(".") and e.name.endswith(".tmp") and e.is_dir()]
        for entry in found:
            name, _, pid = entry.name.removesuffix(".tmp").rpartition(".")
            here = name.endswith(f".{mine}") and pid.isdecimal()
            if not _lives(pid) if here else _stale(entry):
                shutil.rmtree(entry.path, ignore_errors=True)


def _stale(entry: os.DirEntry[str]) -> bool:
    try:
        return time.time() - entry.stat().st_mtime > _STALE_S
    except FileNotFoundError:  # renamed or removed by its process meanwhile
        return False


def _lives(pid: str) -> bool:
    """Whether a process exists and is not a zombie that nobody has reaped."""
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):  # the latter: no number of a process
        return False
    except PermissionError:
        return True  # somebody else's
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False  # it ended between the two; a read of what was just opened says ESRCH
    return state not in "ZX"
