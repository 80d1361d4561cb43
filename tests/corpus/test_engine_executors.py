"""The executors of the task engine: equal results everywhere, job arrays, Ray, time per task."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from opencoder.corpus.engine import (
    ArrayExecutor,
    LocalExecutor,
    RunReport,
    Task,
    TasksFailed,
    make_executor,
    run,
    run_share,
)
from opencoder.corpus_config import EngineConfig
from opencoder.errors import DataError, UserError
from tests.corpus.engine_plans import content, sums, task

# ---- executors ----


def by_array(tasks: list[Task], folder: Path, count: int) -> RunReport:
    one = f"{sys.executable} -m opencoder.tools.cli run-tasks {{folder}} --index $i --count {{count}}"
    command = f"for i in $(seq 0 {count - 1}); do {one} & done; wait"
    return run(tasks, folder=folder, executor=ArrayExecutor(count=count, command=command, poll_s=0.1))


def test_results_do_not_depend_on_executor_or_workers(tmp_path: Path, two: LocalExecutor) -> None:
    tasks = sums([5, 6, 7, 8])
    run(tasks, folder=tmp_path / "two", executor=two)
    with LocalExecutor(1) as one:
        run(tasks[::-1], folder=tmp_path / "one", executor=one)
    by_array(tasks, tmp_path / "array", 2)
    truth = content(tmp_path / "two")
    assert truth["total.txt"] == "26"
    assert content(tmp_path / "one") == truth
    assert content(tmp_path / "array") == truth


def test_results_on_ray_are_the_same(tmp_path: Path, two: LocalExecutor) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    from opencoder.corpus.engine import RayExecutor

    tasks = sums([5, 6, 7, 8])
    run(tasks, folder=tmp_path / "local", executor=two)
    with RayExecutor(workers=2) as executor:
        run(tasks, folder=tmp_path / "ray", executor=executor)
        assert content(tmp_path / "ray") == content(tmp_path / "local")
        calls = tmp_path / "calls"
        victim = [task("victim", "die", calls=str(calls), times=1), task("bad", "fail", text="no good")]
        with pytest.raises(TasksFailed, match=r"1 of 2 tasks failed: bad.*no good") as caught:
            run(victim, folder=tmp_path / "ray", executor=executor)
        assert caught.value.report.attempts == {"victim": 2}


def test_array_reports_failures_and_elements_that_die(tmp_path: Path) -> None:
    tasks = [task("bad", "fail", text="no good"), *sums([1, 2])]
    with pytest.raises(TasksFailed, match=r"1 of 5 tasks failed: bad.*no good"):
        by_array(tasks, tmp_path / "a", 2)
    with pytest.raises(TasksFailed, match=r"the array ended \(exit status 7\) without a result .*attempts: 2"):
        run(sums([1]), folder=tmp_path / "b", executor=ArrayExecutor(count=1, command="exit 7", poll_s=0.1), retries=1)


def test_shares_are_checked(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tasks\.jsonl cannot be read"):
        run_share(tmp_path, 0, 1)
    with pytest.raises(UserError, match="--index 2 --count 2"):
        run_share(tmp_path, 2, 2)
    (tmp_path / "tasks.jsonl").write_text('{"format": 1, "tasks": 2}\n{"task": 1}\n')
    with pytest.raises(DataError, match=r"tasks\.jsonl, line 2 is not a task"):
        run_share(tmp_path, 0, 1)
    (tmp_path / "tasks.jsonl").write_text('{"format": 1, "tasks": 2}\n')
    with pytest.raises(DataError, match="lists 0 tasks and says 2"):
        run_share(tmp_path, 0, 1)


def test_the_configuration_chooses_the_executor() -> None:
    with make_executor(EngineConfig(memory_per_worker_mb=300), workers=3) as local:
        assert isinstance(local, LocalExecutor)
        assert (local.capacity, local.memory_per_worker) == (3, 300 << 20)
    with make_executor(EngineConfig(executor="array", array_count=7, array_command="true"), workers=3) as array:
        assert isinstance(array, ArrayExecutor)
        assert (array.count, array.command) == (7, "true")


def test_a_process_does_one_task_after_the_other(tmp_path: Path) -> None:
    """Starting one takes longer than most tasks do."""
    with LocalExecutor(1) as one:
        for stage in ("a", "b"):
            run([task(f"{stage}/{i}", "process") for i in range(20)], folder=tmp_path, executor=one)
    assert len({path.read_text() for path in tmp_path.rglob("*.txt")}) == 1
