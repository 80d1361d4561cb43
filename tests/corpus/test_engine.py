"""The task engine: keys, what is skipped, damage, failures, wrong plans."""

from __future__ import annotations

import os
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opencoder.corpus.engine import (
    DamagedFile,
    Input,
    LocalExecutor,
    Task,
    TasksFailed,
    open_verified,
    read_manifest,
    run,
)
from opencoder.corpus.engine import task as task_module
from opencoder.corpus.engine.execute import Job, Outcome, execute
from opencoder.errors import DataError
from tests.corpus.engine_plans import HERE, content, sums, task

pytestmark = pytest.mark.fast


# ---- what is done is skipped ----


def test_tasks_run_in_the_order_of_their_files_and_are_not_run_again(tmp_path: Path, two: LocalExecutor) -> None:
    report = run(sums([1, 2, 40]), folder=tmp_path, executor=two)
    assert (report.done, report.skipped, report.failed) == (5, 0, [])
    assert (tmp_path / "total.txt").read_text() == "43"
    assert (tmp_path / "shout.length.txt").read_text() == "2"
    manifest = read_manifest(tmp_path, "number/002")
    assert manifest is not None
    assert manifest["result"] == {"value": 40}
    assert manifest["outputs"]["number/002.txt"] == {
        "size": 2,
        "sha256": task_module.sha256_of(tmp_path / "number/002.txt"),
    }
    assert 1 << 20 < manifest["measured"]["peak_rss_bytes"] < 2 << 30
    again = run(sums([1, 2, 40]), folder=tmp_path, executor=two)
    assert (again.done, again.skipped) == (0, 5)
    assert not list(tmp_path.rglob("*.tmp"))


def test_only_what_a_change_reaches_runs_again(tmp_path: Path, two: LocalExecutor) -> None:
    run(sums([1, 2]), folder=tmp_path, executor=two)
    report = run(sums([1, 3]), folder=tmp_path, executor=two)
    assert (report.done, report.skipped) == (3, 1)
    assert (tmp_path / "total.txt").read_text() == "4"
    report = run(sums([3, 1]), folder=tmp_path, executor=two)  # equal sum: what reads it need not run
    assert (report.done, report.skipped) == (3, 1)


@pytest.mark.parametrize("by", ["content", "stat"])
def test_a_source_that_changed_is_seen(tmp_path: Path, two: LocalExecutor, by: Any) -> None:
    source = tmp_path / "source"
    source.write_text("a")
    tasks = [task("shout", "shout", Input(str(source), by), outputs=("txt", "n"))]
    folder = tmp_path / "work"
    assert run(tasks, folder=folder, executor=two).done == 1
    assert run(tasks, folder=folder, executor=two).skipped == 1
    source.write_text("b")
    assert run(tasks, folder=folder, executor=two).done == 1
    assert (folder / "shout.txt").read_text() == "B"
    os.utime(source, (1, 1))
    report = run(tasks, folder=folder, executor=two)
    assert (report.done, report.skipped) == ((1, 0) if by == "stat" else (0, 1))


def test_verify_reads_sources_again(tmp_path: Path, two: LocalExecutor) -> None:
    source = tmp_path / "source"
    source.write_text("a")
    times = source.stat()
    tasks = [task("s", "shout", Input(str(source), "stat"), outputs=("txt", "n"))]
    run(tasks, folder=tmp_path / "work", executor=two)
    assert run(tasks, folder=tmp_path / "work", executor=two, verify=True).skipped == 1
    source.write_text("b")
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert run(tasks, folder=tmp_path / "work", executor=two).skipped == 1
    assert run(tasks, folder=tmp_path / "work", executor=two, verify=True).done == 1
    assert (tmp_path / "work/s.txt").read_text() == "B"


def test_a_source_known_by_its_time_is_not_read_again(tmp_path: Path, two: LocalExecutor, monkeypatch: Any) -> None:
    source = tmp_path / "source"
    source.write_text("a")
    tasks = [task(f"s{by}", "shout", Input(str(source), by), outputs=("txt", "n")) for by in ("content", "stat")]
    run(tasks, folder=tmp_path / "work", executor=two)

    def refuse(path: Any) -> str:
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr("opencoder.corpus.engine.digests.sha256_of", refuse)
    monkeypatch.setattr("opencoder.corpus.engine.task.sha256_of", refuse)
    task_module.code_version(f"{HERE}:shout")
    assert run(tasks, folder=tmp_path / "work", executor=two).skipped == 2


def test_another_code_version_runs_again(tmp_path: Path, two: LocalExecutor) -> None:
    def plan(code: str) -> list[Task]:
        return [Task("n", f"{HERE}:number", ("txt",), parameters={"value": 1}, code=code)]

    assert run(plan("1"), folder=tmp_path, executor=two).done == 1
    assert run(plan("1"), folder=tmp_path, executor=two).skipped == 1
    assert run(plan("2"), folder=tmp_path, executor=two).done == 1


@pytest.mark.parametrize("harm", ["remove", "cut", "touch", "no manifest", "broken manifest", "half"])
def test_a_harmed_result_is_made_again(tmp_path: Path, two: LocalExecutor, harm: str) -> None:
    run(sums([1, 2]), folder=tmp_path, executor=two)
    before = content(tmp_path)
    path, manifest = tmp_path / "number/000.txt", tmp_path / "number/000.task.json"
    if harm == "remove":
        path.unlink()
    elif harm == "cut":
        path.write_text("")
    elif harm == "touch":
        os.utime(path, (1, 1))
    elif harm == "no manifest":
        manifest.unlink()
    elif harm == "broken manifest":
        manifest.write_text(manifest.read_text()[:50])
    else:  # killed between the output and the manifest, scratch folder left behind
        manifest.unlink()
        (tmp_path / f"number/.000.{os.uname().nodename}.999999999.tmp").mkdir()
    assert run(sums([1, 2]), folder=tmp_path, executor=two).done == 1
    assert content(tmp_path) == before
    assert not list(tmp_path.rglob("*.tmp"))


def test_silent_damage_is_found_by_verify_and_by_whoever_reads(tmp_path: Path, two: LocalExecutor) -> None:
    run(sums([1, 2]), folder=tmp_path, executor=two)
    path = tmp_path / "number/000.txt"
    with open_verified(path) as file:
        assert file.read() == b"1"
    times = path.stat()
    path.write_text("7")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # size and time as before
    with pytest.raises(DamagedFile, match=r"number/000.txt is damaged \(SHA-256"):
        open_verified(path)
    assert run(sums([1, 2]), folder=tmp_path, executor=two).skipped == 4
    (tmp_path / "total.txt").unlink()
    with pytest.raises(TasksFailed, match=r"total: DamagedFile: .*number/000.txt is damaged"):
        run(sums([1, 2]), folder=tmp_path, executor=two)
    report = run(sums([1, 2]), folder=tmp_path, executor=two, verify=True)
    assert (report.done, report.skipped) == (2, 2)
    assert (tmp_path / "total.txt").read_text() == "3"


def test_results_of_an_earlier_boot_are_verified(tmp_path: Path, two: LocalExecutor, monkeypatch: Any) -> None:
    run(sums([1, 2]), folder=tmp_path, executor=two)
    path = tmp_path / "number/000.txt"
    times = path.stat()
    path.write_text("\0")  # what a power failure may leave of a file
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    monkeypatch.setattr(task_module, "boot_id", lambda: "another")
    report = run(sums([1, 2]), folder=tmp_path, executor=two)
    assert (report.done, report.skipped) == (1, 3)
    assert path.read_text() == "1"


def test_files_without_a_record_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DamagedFile, match="no manifest beside it"):
        open_verified(tmp_path / "a.txt")


# ---- failures ----


def test_a_failing_task_stops_only_what_needs_it(tmp_path: Path, two: LocalExecutor) -> None:
    tasks = [task("bad", "fail", text="no good"), task("sum", "total", "bad.txt"), *sums([1, 2])]
    with pytest.raises(TasksFailed, match=r"1 of 6 tasks failed: bad; 1 not run .* RuntimeError: no good") as caught:
        run(tasks, folder=tmp_path, executor=two)
    report = caught.value.report
    assert (report.done, report.blocked) == (4, ["sum"])
    text = Path(report.failed[0].log).read_text()
    assert "Traceback" in text
    assert "raise RuntimeError(text)" in text
    assert not (tmp_path / "bad.txt").exists()
    assert not list(tmp_path.rglob("*.tmp"))
    with pytest.raises(TasksFailed):
        run(tasks, folder=tmp_path, executor=two)  # a failed task is tried again


def test_nothing_new_starts_after_max_failures(tmp_path: Path, two: LocalExecutor) -> None:
    tasks = [task(f"bad/{i}", "fail", text="x") for i in range(20)]
    with pytest.raises(TasksFailed) as caught:
        run(tasks, folder=tmp_path, executor=two, max_failures=3)
    report = caught.value.report
    assert 3 <= len(report.failed) <= 4  # one may have been running
    assert len(report.failed) + len(report.blocked) == 20


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (task("x", "nothing"), "task x ended without writing x.txt"),
        (task("x", "absent"), "has no function absent"),
        (Task("x", "tests.absent:f", ("txt",)), "there is no module tests.absent"),
        (task("x", "total", "absent.txt"), r"input .*absent.txt cannot be read"),
        (task("x", "total", Input("/absent", "stat")), "No such file"),
        (task("x", "number", wrong=1), "unexpected keyword argument 'wrong'"),
    ],
)
def test_what_cannot_run_is_named(tmp_path: Path, two: LocalExecutor, bad: Task, says: str) -> None:
    with pytest.raises(TasksFailed, match=says) as caught:
        run([bad, task("good", "number", value=1)], folder=tmp_path, executor=two)
    assert caught.value.report.done == 1


def test_a_source_that_changes_while_it_is_read_is_no_result(tmp_path: Path, two: LocalExecutor) -> None:
    source = tmp_path / "source"
    source.write_text("a")
    with pytest.raises(TasksFailed, match="source changed while task x read it"):
        run([task("x", "touch_source", Input(str(source), "stat"))], folder=tmp_path / "work", executor=two)
    assert not (tmp_path / "work" / "x.txt").exists()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: task("../x", "number"), "task name '../x'"),
        (lambda: task("a.b", "number"), "task name"),
        (lambda: Task("a", "os.system", ("x",)), "must be written module:function"),
        (lambda: Task("a", "m:f", ()), "at least one suffix"),
        (lambda: Task("a", "m:f", ("task.json",)), "cannot be the suffix"),
        (lambda: Task("a", "m:f", ("x",), parameters={"p": (1, 2)}), "change on the way through JSON"),
        (lambda: Task("a", "m:f", ("x",), parameters={"p": {1}}), "must be plain JSON"),
        (lambda: Task("a", "m:f", ("x",), parameters={"p": float("nan")}), "must be plain JSON"),
        (lambda: LocalExecutor(0), "workers=0"),
    ],
)  # fmt: skip
def test_wrong_tasks_are_refused(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_impossible_plans_are_refused(tmp_path: Path, two: LocalExecutor) -> None:
    with pytest.raises(DataError, match=r"two tasks write a\.task\.json"):
        run([task("a", "number", value=1), task("a", "number", value=2)], folder=tmp_path, executor=two)
    with pytest.raises(DataError, match=r"lies in the folder of the run: write it as a\.txt"):
        run([task("b", "total", str(tmp_path / "a.txt"))], folder=tmp_path, executor=two)
    circle = [task("a", "total", "b.txt"), task("b", "total", "a.txt")]
    with pytest.raises(DataError, match="wait for each other in a circle: a, b"):
        run(circle, folder=tmp_path, executor=two)


# ---- any plan, any order, any kills ----


class Chance:
    """An executor in this process that finishes jobs in random order and kills some of them."""

    def __init__(self, seed: int, capacity: int, kills: float) -> None:
        self.draw, self.capacity, self.kills = random.Random(seed), capacity, kills
        self.jobs: list[Job] = []

    def submit(self, job: Job) -> None:
        assert len(self.jobs) < self.capacity
        self.jobs.append(job)

    def wait(self, timeout_s: float) -> list[Outcome]:
        assert not any(job.attempt == 3 for job in self.jobs) or len(self.jobs) == 1  # the last attempt of three
        job = self.jobs.pop(self.draw.randrange(len(self.jobs)))
        if job.attempt < 3 and self.draw.random() < self.kills:
            return [Outcome(job, "killed", error="by chance")]
        return [execute(job)]

    def cancel(self) -> None:
        self.jobs.clear()


@given(st.data(), st.integers(0, 999), st.integers(1, 4), st.sampled_from([0.0, 0.3, 0.9]))
@settings(max_examples=40, deadline=None)
def test_any_plan_gives_the_same_in_any_order(data: st.DataObject, seed: int, capacity: int, kills: float) -> None:
    tasks: list[Task] = []
    truth: list[int] = []
    for i in range(data.draw(st.integers(1, 8))):
        before = data.draw(st.sets(st.integers(0, i - 1), max_size=3)) if i else set()
        if before:
            tasks.append(task(f"s{i}", "total", *(f"{tasks[j].name}.txt" for j in sorted(before))))
            truth.append(sum(truth[j] for j in before))
        else:
            tasks.append(task(f"n{i}", "number", value=10**i))
            truth.append(10**i)
    with tempfile.TemporaryDirectory() as folder:
        shuffled = data.draw(st.permutations(tasks))
        report = run(shuffled, folder=folder, executor=Chance(seed, capacity, kills))
        assert report.done == len(tasks)
        assert [int((Path(folder) / f"{t.name}.txt").read_text()) for t in tasks] == truth
        lost = data.draw(st.sets(st.sampled_from([t.name for t in tasks]), max_size=3))
        for name in lost:
            (Path(folder) / f"{name}.txt").unlink()
        again = run(tasks, folder=folder, executor=Chance(seed, capacity, 0.0))
        assert (again.done, again.skipped) == (len(lost), len(tasks) - len(lost))
