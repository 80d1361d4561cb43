"""Numbers read a step late, as on a GPU: the run, what it skips and what it saves are those of one that reads them at once."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from opencoder.checkpoint import folders
from opencoder.config import load_config, validate
from opencoder.errors import Failure
from opencoder.model.decoder import named_parameters
from opencoder.parallel.mesh import Mesh, create_mesh
from opencoder.train.late import LAG, Late, on_device
from opencoder.train.loop import Trainer
from tests.harness import run_ranks
from tests.train.test_run import config, prefix, read_rows, same_checkpoints  # noqa: F401  prefix is a fixture
from tests.train.test_skipping import CPU, REWIND, told, train_here, train_poisoned  # noqa: F401  told is a fixture

EXACT = ("step", "loss", "grad_norm", "lr", "tokens", "skipped", "left_out", "valid_loss", "loss_by_source", "z_loss")


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAG, "cpu", 1)


def numbers(run: Path) -> list[list[object]]:
    return [[row.get(name) for name in EXACT] for row in read_rows(run / "metrics.jsonl")]


def test_a_late_run_equals_one_that_is_not(tmp_path: Path, prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    asked = ["train.skip={window: 8, steps: [3]}", "checkpoint.every=5", "train.eval_every=4", "train.z_loss=1e-4"]
    asked += ["data.split='9,1,0'", "log.every=2"]
    for lag in (0, 1):
        monkeypatch.setitem(LAG, "cpu", lag)
        train_here(config(tmp_path, prefix, name=str(lag)), *asked, bad=(7, 8))
    runs = [tmp_path / "0", tmp_path / "1"]
    rows = numbers(runs[1])
    assert rows == numbers(runs[0])
    assert [row[5] for row in rows] == [step in (3, 7, 8) for step in range(1, 13)]
    assert [row[7] is not None for row in rows] == [step % 4 == 0 for step in range(1, 13)]
    assert same_checkpoints(*runs)
    assert [folders.step_of(folder) for folder in folders.list_checkpoints(runs[1])] == [5, 10, 12]
    for name in ("step_00000007.json", "step_00000008.json"):  # what they were compared with, too
        assert (runs[0] / "skipped" / name).read_bytes() == (runs[1] / "skipped" / name).read_bytes()
    ranks = [[row["step"] for row in read_rows(run / "ranks.jsonl")] for run in runs]
    assert ranks[0] == ranks[1] == [2, 4, 6, 8, 10, 12]
    took = [row["step_s"] for row in read_rows(runs[1] / "metrics.jsonl") if not row.get("left_out")]
    assert min(took) > 0


@pytest.mark.usefixtures("late")
def test_a_late_run_rewinds_to_the_same_step(tmp_path: Path, prefix: Path, told: Path) -> None:  # noqa: F811
    """Step 10 is worked out before it is known that 9 was the third in a row; the save of step 8 comes before that."""
    path = config(tmp_path, prefix)
    state = train_here(path, *REWIND, bad=(7, 8, 9))
    assert (state.rewinds, state.left_out, state.skipped) == (1, [6, 7, 8, 9], [])
    names = ("step", "loss", "grad_norm", "lr", "tokens", "skipped")
    found, truth = (
        [[row[n] for n in names] for row in read_rows(r / "metrics.jsonl")] for r in (tmp_path / "run", told)
    )
    assert found == truth
    assert same_checkpoints(tmp_path / "run", told)


def late_rewinds(rank: int, world: int, path: str) -> tuple[int, list[int], int]:
    trainer = Trainer(load_config(path, [*REWIND, "checkpoint.every=4"]), create_mesh(), CPU)
    trainer.lag = 1
    state = train_poisoned(trainer, (7, 8, 9) if rank == 1 else ())
    return state.rewinds, state.left_out, state.step


def test_all_ranks_of_a_late_run_rewind_together(tmp_path: Path, prefix: Path) -> None:  # noqa: F811
    found = run_ranks(late_rewinds, 2, str(config(tmp_path, prefix)))
    assert found == [(1, [6, 7, 8, 9], 12)] * 2


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("every", [3, 4])
def test_a_late_run_ends_at_a_norm_that_is_not_finite_and_saves_nothing_of_it(
    tmp_path: Path,
    prefix: Path,  # noqa: F811
    every: int,
) -> None:
    path = config(tmp_path, prefix)
    with pytest.raises(Failure, match=r"step 4: loss [\d.]+, gradient norm nan: not finite"):
        train_here(path, f"checkpoint.every={every}", bad=(4,))
    assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]
    saved = [folders.step_of(folder) for folder in folders.list_checkpoints(tmp_path / "run")]
    assert saved == ([3] if every == 3 else []), "step 4 is due and must not be saved"


@pytest.mark.usefixtures("late")
def test_a_late_run_stops_within_a_step_of_being_asked(tmp_path: Path, prefix: Path) -> None:  # noqa: F811
    settings = load_config(config(tmp_path, prefix), ["checkpoint.every=null"])
    validate(settings, 1)
    trainer = Trainer(settings, Mesh(), CPU)

    def ask(gradient: torch.Tensor) -> None:
        if trainer.state.step == 3:  # in the backward pass of step 4
            os.kill(os.getpid(), signal.SIGTERM)

    next(iter(named_parameters(trainer.model).values())).register_hook(ask)
    trainer.run()
    assert trainer.state.step == trainer.state.saved_step == 5
    assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_what_was_waited_for_a_save_before_a_step_left_out_is_told_after_it(tmp_path: Path, prefix: Path) -> None:  # noqa: F811
    settings = load_config(config(tmp_path, prefix), ["train.steps=3", "train.skip={steps: [1]}"])
    trainer = Trainer(settings, Mesh(), CPU)
    trainer.save_wait_s = 5.0
    trainer.run()
    left_out, *done = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert "save_wait_s" not in left_out
    assert [row["save_wait_s"] >= 5 for row in done] == [True, False]


def test_numbers_are_those_of_the_moment_they_were_asked_for() -> None:
    x, flag, n = torch.tensor([[1.5, 2.5]]), torch.tensor(True), torch.tensor(2**40 + 1)
    late = Late({"x": x, "flag": flag, "n": n})
    x += 1
    flag.logical_not_()
    found = late.read()
    assert found["x"].tolist() == [[1.5, 2.5]]
    assert (bool(found["flag"]), int(found["n"])) == (True, 2**40 + 1)
    assert late.wait() == late.wait()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_only_the_read_waits() -> None:
    device = torch.device("cuda")
    work = torch.randn(4096, 4096, device=device)
    for _ in range(3):  # warm up
        late = Late({"x": work.sum(), "y": on_device([1.0, 2.0], device)})
        late.read()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(50):
            work @ work
        late = Late({"x": work.sum(), "y": on_device([1.0, 2.0], device)})
        queued = torch.cuda.Event()
        queued.record()
        assert not queued.query(), "the host has waited for the products"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert late.read()["y"].tolist() == [1.0, 2.0]
    assert queued.query()
