"""What ends a run: a rank that hangs, is killed or fails ends all within seconds, and one line tells why."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from opencoder.config import load_config
from opencoder.console import run
from opencoder.errors import ConfigError
from opencoder.parallel.mesh import create_mesh
from opencoder.train.loop import Trainer
from opencoder.train.metrics import read_rows
from opencoder.train.watchdog import Beat, blame, watched
from tests import harness
from tests.train.test_run import config, prefix  # noqa: F401  prefix is a fixture


class Ended(NamedTuple):
    status: list[int | None]
    """Exit status of each rank."""
    lines: list[str]
    """What they wrote to stderr, all together."""
    seconds: float


def _main(work: Callable[..., None], rank: int, world: int, folder: str) -> None:
    err = os.open(f"{folder}/err_{rank}", os.O_CREAT | os.O_WRONLY)
    os.dup2(err, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)

    def command(argv: Any) -> None:
        work(rank, Path(folder))

    run(command)


def ends(work: Callable[..., None], world: int, folder: Path) -> Ended:
    """Run `work(rank, folder)` on each rank as a command does, until all have ended."""
    folder.mkdir(exist_ok=True)
    start = time.monotonic()
    arguments = [(work, rank, world, str(folder)) for rank in range(world)]
    processes = [harness._context.Process(target=_main, args=a, daemon=True) for a in arguments]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(40)
        status = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
    lines = [line for rank in range(world) for line in (folder / f"err_{rank}").read_text().splitlines()]
    return Ended(status, lines, time.monotonic() - start)


def sleeps(rank: int, folder: Path) -> None:
    """Rank 3 sleeps. Rank 1 waits for it over dp, and rank 0 for rank 1 over tp; rank 2 for rank 3 over tp."""
    mesh = create_mesh(tp=2)
    with watched(mesh, timeout_s=1.0, run_dir=folder, on_cuda=False):
        mesh.records.step = 57
        mesh.tp.all_reduce(torch.zeros(1))
        if rank == 3:
            time.sleep(60)
        if rank == 1:
            mesh.dp.all_reduce(torch.zeros(1))
        mesh.tp.all_reduce(torch.zeros(1))


def test_a_rank_that_hangs_is_named_and_all_end(tmp_path: Path) -> None:
    found = ends(sleeps, 4, tmp_path)
    assert found.status == [1, 1, 1, 1]
    assert found.seconds < 20
    (line,) = found.lines
    assert line.startswith("failed: rank ")
    assert "(train.timeout_s=1) in all_reduce #" in line
    assert "at step 57; " in line
    assert "rank 3 is behind, at #" in line
    assert "rank 3" in line.split("; ")[-1], "the one that waits for nobody comes last"
    for rank in range(4):
        dumped = json.loads((tmp_path / "hang" / f"rank_{rank}.json").read_text())
        assert dumped["rank"] == rank
        assert dumped["records"][0]["what"] == "all_reduce #1 over tp at step 57"
        assert any(entry["profiling_name"] == "gloo:all_reduce" for entry in dumped["flight_recorder"]["entries"])
        assert ("time.sleep(60)" in "".join(dumped["stacks"]["MainThread"])) == (rank == 3)
        assert (dumped["waits_for"] is None) == (rank == 3)


def is_killed(rank: int, folder: Path) -> None:
    mesh = create_mesh(tp=3)
    with watched(mesh, timeout_s=4.0, run_dir=folder, on_cuda=False):
        mesh.tp.all_reduce(torch.zeros(1))
        if rank == 1:
            time.sleep(1)  # so that it has beaten
            os.kill(os.getpid(), signal.SIGKILL)
        mesh.tp.all_gather(torch.zeros(1))


def test_a_rank_that_is_killed_ends_the_others(tmp_path: Path) -> None:
    found = ends(is_killed, 3, tmp_path)
    assert found.status == [1, -signal.SIGKILL, 1]
    assert found.seconds < 20
    (line,) = found.lines
    assert line.startswith("failed: rank 1 is gone (killed, out of memory, or without network): on rank ")
    assert "all_gather #2 over tp at step 0 broke off: " in line


def has_a_defect(rank: int, folder: Path) -> None:
    mesh = create_mesh(tp=2)
    with watched(mesh, timeout_s=4.0, run_dir=folder, on_cuda=False):
        if rank == 1:
            raise KeyError("a defect of ours")
        mesh.tp.all_reduce(torch.zeros(1))


def test_a_defect_on_one_rank_keeps_its_traceback_and_ends_the_others_without_a_word(tmp_path: Path) -> None:
    found = ends(has_a_defect, 2, tmp_path)
    assert found.status == [1, 1]
    assert found.seconds < 20
    assert not (tmp_path / "err_0").read_text()
    assert "KeyError: 'a defect of ours'" in found.lines[-1]


def is_refused(rank: int, folder: Path) -> None:
    with watched(create_mesh(tp=2), timeout_s=4.0, run_dir=folder, on_cuda=False):
        raise ConfigError("the same on all ranks")


def test_what_all_ranks_refuse_is_told_once(tmp_path: Path) -> None:
    found = ends(is_refused, 2, tmp_path)
    assert found.status == [2, 2]
    assert found.lines == ["error: the same on all ranks"]


@pytest.mark.fast
def test_blame_goes_from_rank_to_rank_to_the_one_that_waits_for_nobody() -> None:
    def waits(what: str, key: str, sequence: int, *ranks: int) -> dict[str, Any]:
        return {"what": what, "key": key, "sequence": sequence, "ranks": ranks}

    over_tp, over_dp = waits("A", "tp@0", 12, 0, 1), waits("B", "dp@1", 4, 1, 3)
    beats = {
        0: Beat(9, 57, {"tp@0": 12}, over_tp, 6.0),
        1: Beat(9, 57, {"tp@0": 11, "dp@1": 4}, over_dp, 6.5),
        3: Beat(9, 56, {"dp@1": 3}, None, 7.0),
    }
    assert blame(0, over_tp, beats) == (
        "rank 1 is at #11, itself in B; rank 3 is behind, at #3, step 56, and for 7.0 s in no collective"
    )
    del beats[3]
    assert blame(1, over_dp, beats) == "rank 3 has never come"
    both = {rank: beats[0]._replace(latest={"tp@0": 12}) for rank in (0, 1)}
    assert blame(0, over_tp, both).startswith("every other rank has begun it too")


# ---- a slow rank ----


def is_slow(rank: int, world: int, path: str) -> list[str]:
    """Rank 1 sleeps in every forward pass. Returns the warnings."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("opencoder").addHandler(handler)
    trainer = Trainer(load_config(path), create_mesh(), torch.device("cpu"))
    if rank == 1:
        trainer.model.layers["1"].register_forward_pre_hook(lambda *_: time.sleep(0.15))
    trainer.run()
    return [line for line in lines if "slow" in line]


def test_a_slow_rank_is_told_once_and_its_times_are_written_down(tmp_path: Path, prefix: Path) -> None:  # noqa: F811
    train = {"steps": 6, "global_batch_size": 4, "micro_batch_size": 2}
    path = config(tmp_path, prefix, train=train, checkpoint={"every": None}, log={"every": 2, "tensorboard": False})
    warnings = harness.run_ranks(is_slow, 2, str(path))
    assert len(warnings[0]) == 1
    assert "rank 1 is slow: busy 0." in warnings[0][0]
    assert not warnings[1]
    rows = read_rows(tmp_path / "run" / "ranks.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 6]
    for row in rows:
        assert row["busy_s"][1] > 0.14
        assert row["busy_s"][0] < row["busy_s"][1] - 0.05, "what it waits is not counted"
        assert len(row["data_wait_s"]) == len(row["mem_gib"]) == 2
    steps = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert all(row["comm_wait_s"] > 0.05 for row in steps)


# ---- pipelines ----


def transfers(rank: int, world: int, path: str, name: str, *overrides: str) -> dict[str, list[Any]]:
    """Two steps of a pipeline; what was sent and received for each direction, in order."""
    settings = load_config(path, ["parallel.pp=2", "train.steps=2", f"run_dir={path}.{name}", *overrides])
    trainer = Trainer(settings, create_mesh(pp=2), torch.device("cpu"))
    trainer.run()
    assert trainer.mesh.records.waiting is None
    found: dict[str, list[Any]] = {}
    for record in trainer.mesh.records.recent():
        if "→" in record.group:
            assert record.finished is not None, record
            found.setdefault(f"{record.operation} {record.group}", []).append(
                (record.sequence, record.step, record.shape)
            )
    return found


def test_what_a_pipeline_sends_and_receives_is_recorded(tmp_path: Path, prefix: Path) -> None:  # noqa: F811
    optim = {"schedule": "constant", "warmup_steps": 0, "decay_steps": 0}
    path = config(tmp_path, prefix, optim=optim, checkpoint={"every": None})
    schedules = {"1f1b": 1, "interleaved": 2, "zb": 2, "zbv": 2}
    cases = {
        name: (str(path), name, f"parallel.schedule={name}", f"parallel.virtual_stages={stages}")
        for name, stages in schedules.items()
    }
    for name, (first, second) in harness.run_cases(transfers, 2, cases).items():
        ways = ("pp 0→1", first, second), ("pp 1→0", second, first)
        for way, sender, receiver in ways:
            assert sender[f"send {way}"] == receiver[f"receive {way}"], name
            assert [sequence for sequence, *_ in sender[f"send {way}"]] == list(
                range(1, len(sender[f"send {way}"]) + 1)
            )
        # 2 steps of 4 micro-batches pass each border between ranks once each way; zbv turns within rank 1.
        borders = {"1f1b": 1, "interleaved": 3, "zb": 3, "zbv": 2}[name]
        assert sum(len(sender[f"send {way}"]) for way, sender, _ in ways) == 2 * 2 * 4 * borders
