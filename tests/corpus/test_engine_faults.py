"""The task engine under kills, signals, memory and a full disk."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from opencoder.corpus.engine import (
    DiskFull,
    LocalExecutor,
    Task,
    TasksFailed,
    read_manifest,
    run,
)
from opencoder.corpus.engine.execute import _stale, remove_leftovers, scratch_folder
from opencoder.errors import UserError
from tests.corpus.engine_plans import HERE, ROOT, sums, task

# ---- kills ----


def test_a_killed_task_is_tried_again_and_the_others_do_not_notice(tmp_path: Path, two: LocalExecutor) -> None:
    calls = tmp_path / "calls"
    tasks = [task("victim", "die", calls=str(calls), times=1), *sums(list(range(10)))]
    report = run(tasks, folder=tmp_path / "work", executor=two)
    assert report.attempts == {"victim": 2}
    assert report.done == 13
    assert (tmp_path / "work/victim.txt").read_text() == "whole"
    manifest = read_manifest(tmp_path / "work", "victim")
    assert manifest is not None
    assert manifest["measured"]["attempt"] == 2
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_last_attempt_has_nothing_beside_it(tmp_path: Path, two: LocalExecutor) -> None:
    calls, others = tmp_path / "calls", tmp_path / "others"
    tasks = [task("victim", "die", calls=str(calls), times=9)]
    tasks += [task(f"slow/{i}", "log_call", calls=str(others), seconds=0.2) for i in range(6)]
    with pytest.raises(TasksFailed, match=r"victim: its process was ended by SIGKILL .*attempts: 3") as caught:
        run(tasks, folder=tmp_path / "work", executor=two)
    assert caught.value.report.done == 6
    last = float(calls.read_text().splitlines()[-1].split()[1])
    assert len(calls.read_text().splitlines()) == 3
    spans = [tuple(map(float, line.split()[1:])) for line in others.read_text().splitlines()]
    assert len(spans) == 6
    assert all(end <= last for _, end in spans)


def test_a_process_that_leaves_is_named(tmp_path: Path, two: LocalExecutor) -> None:
    with pytest.raises(TasksFailed, match=r"x: its process ended by itself with exit status 3 \(attempts: 1"):
        run([task("x", "leave")], folder=tmp_path, executor=two, retries=0)


def test_memory_of_a_worker_is_bounded_and_reported(tmp_path: Path) -> None:
    limit = 400 << 20
    with LocalExecutor(1, memory_per_worker=limit) as executor:
        tasks = [task("small", "hold", mebibytes=100, seconds=0.0), task("big", "hold", mebibytes=600, seconds=20.0)]
        with pytest.raises(TasksFailed, match=r"big: used [4-9]\d\d MiB, more than the 400 MiB") as caught:
            run(tasks, folder=tmp_path, executor=executor)  # killed before its end, or it would have succeeded
    assert caught.value.report.failed[0].attempts <= 2  # in a worker of its own, once is enough
    assert 100 << 20 < caught.value.report.peak_rss_bytes < limit
    manifest = read_manifest(tmp_path, "small")
    assert manifest is not None
    assert manifest["measured"]["peak_rss_bytes"] > 100 << 20


def test_too_many_workers_for_the_memory_are_warned_of(monkeypatch: Any, caplog: Any) -> None:
    monkeypatch.setattr("opencoder.corpus.engine.memory.available_memory", lambda: 1 << 30)
    LocalExecutor(16).close()
    assert "16 workers may use 256 MiB each, more than the 1024 MiB available" in caplog.text


def test_a_peak_above_what_the_task_states_is_reported(tmp_path: Path, two: LocalExecutor) -> None:
    stated = Task("x", f"{HERE}:hold", ("txt",), parameters={"mebibytes": 50, "seconds": 0}, memory=1 << 20)
    assert run([stated], folder=tmp_path, executor=two).above_stated == ["x"]


def test_a_full_disk_stops_the_run_and_keeps_what_is_done(tmp_path: Path, two: LocalExecutor) -> None:
    tasks = [*sums([1, 2]), task("full", "fill_disk"), *(task(f"later/{i}", "number", value=i) for i in range(50))]
    with pytest.raises(
        DiskFull, match=r"no space left .*task full .*No space left on device.* make room and start again"
    ):
        run(tasks, folder=tmp_path, executor=two)
    assert not (tmp_path / "full.txt").exists()
    assert not (tmp_path / "later/49.txt").exists()
    report = run(sums([1, 2]), folder=tmp_path, executor=two)
    assert report.skipped >= 2


# ---- the driver itself ----

DRIVER = """
import sys
from opencoder.console import run as command
from opencoder.corpus.engine import LocalExecutor, Task, run
def main(argv):
    tasks = [Task(f"t/{i}", "tests.corpus.engine_tasks:log_call", ("txt",),
                  parameters={"calls": sys.argv[2], "seconds": 0.3}) for i in range(8)]
    with LocalExecutor(2) as executor:
        print(run(tasks, folder=sys.argv[1], executor=executor))
if __name__ == "__main__":
    command(main, [])
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 1), (signal.SIGKILL, -9)])
def test_a_stopped_driver_goes_on_where_it_was(tmp_path: Path, two: LocalExecutor, number: int, status: int) -> None:
    script, calls, work = tmp_path / "driver.py", tmp_path / "calls", tmp_path / "work"
    script.write_text(DRIVER)
    command = [sys.executable, str(script), str(work), str(calls)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(lambda: len(list(work.glob("t/*.task.json"))) >= 2)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    assert process.wait(20) == status
    assert process.stderr is not None
    message = process.stderr.read()
    assert "Traceback" not in message
    if number == signal.SIGTERM:
        assert "stopped by SIGTERM" in message
    done = len(list(work.glob("t/*.task.json")))
    assert 2 <= done < 8
    time.sleep(0.5)
    assert len(list(work.glob("t/*.task.json"))) == done  # no worker went on
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert f"skipped={done}, done={8 - done}" in result.stdout
    assert not list(work.rglob("*.tmp"))


def wait_for(condition: Any, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_a_second_driver_is_refused(tmp_path: Path, two: LocalExecutor) -> None:
    import fcntl

    with open(tmp_path / ".driver.lock", "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run is at work"):
            run(sums([1]), folder=tmp_path, executor=two)
    assert run(sums([1]), folder=tmp_path, executor=two).done == 3


def test_a_process_that_ends_while_it_is_looked_up_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading /proc/PID/stat that was opened in time says ESRCH, not ENOENT."""
    victim = task("victim", "fail", text="never run")
    scratch = scratch_folder(tmp_path, victim)
    scratch.mkdir()
    remove_leftovers(tmp_path, [victim])
    assert scratch.is_dir()  # its process, this one, lives
    with monkeypatch.context() as patch:
        patch.setattr(os, "kill", failing(PermissionError(errno.EPERM, os.strerror(errno.EPERM))))
        remove_leftovers(tmp_path, [victim])
    assert scratch.is_dir()  # a process of somebody else, which /proc may hide
    monkeypatch.setattr(Path, "read_text", failing(ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))))
    remove_leftovers(tmp_path, [victim])
    assert not scratch.exists()


def failing(error: OSError) -> Any:
    def fail(*args: Any, **options: Any) -> None:
        raise error

    return fail


def test_folders_that_look_like_leftovers_end_no_run(tmp_path: Path) -> None:
    """A number that no process can have is of no process; one that went away meanwhile is not stale."""
    host = os.uname().nodename
    odd = tmp_path / f".x.{host}.{10**20}.tmp"
    other = tmp_path / f".x.{host}.².tmp"
    odd.mkdir()
    other.mkdir()
    remove_leftovers(tmp_path, [task("x", "fail", text="never run")])
    assert [odd.exists(), other.exists()] == [False, True]
    with os.scandir(tmp_path) as entries:
        (entry,) = entries
    other.rmdir()
    assert not _stale(entry)
