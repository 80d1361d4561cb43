"""Updates left out: by all ranks together, without a trace in the weights, written down, and a run that has too many ends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from opencoder.checkpoint import folders, native
from opencoder.config import Config, OptimConfig, load_config, validate
from opencoder.errors import Failure
from opencoder.model.decoder import named_parameters
from opencoder.model.initialise import build_model
from opencoder.optim.build import build_optimizer
from opencoder.optim.guard import Guard
from opencoder.parallel.mesh import Mesh, create_mesh
from opencoder.train.environment import environment
from opencoder.train.loop import Trainer
from opencoder.train.skipping import Skipping
from opencoder.train.stages import Settings, plan
from opencoder.train.state import RunState
from opencoder.train.step import TrainStep
from tests.harness import run_cases, run_ranks
from tests.model.cases import SMALL, model_config
from tests.parity.cases import Case, micro_batches
from tests.train.test_run import config, prefix, read_rows, same_checkpoints, train  # noqa: F401  prefix is a fixture

CPU = torch.device("cpu")


def five_steps(rank: int, world: int, tp: int, sharded: bool, poisoned: bool) -> Any:
    """Step 3 has a gradient that is not finite on one rank alone; or none, and a guard that leaves out step 3."""
    mesh = create_mesh(tp=tp)
    model = build_model(model_config(SMALL), mesh, dtype=torch.float64, device=CPU, seed=3)
    optimizer = build_optimizer(named_parameters(model), OptimConfig(), mesh, sharded=sharded, modules=[model])
    guard = Guard(window=8, sigma=6.0, world=mesh.world, device=CPU)
    now = [0]

    def third(loss: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        return torch.tensor(now[0] == 3)

    step = TrainStep(model, optimizer, mesh, device=CPU, guard=guard if poisoned else third)

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        bad = poisoned and now[0] == 3 and rank == world - 1
        return gradient * (float("nan") if bad else 1.0)

    model.layers["1"].mlp.up_proj.weight.register_hook(poison)
    skipped = []
    for i in range(1, 6):
        now[0] = i
        batch = micro_batches(Case(1, SMALL), 250, mesh.dp.rank, mesh.dp.size)
        skipped.append(bool(step.update(batch, lr=1e-2).skip))
    optimizer.wait_weights()
    return skipped, [p.detach().clone() for p in model.parameters()]


def test_a_gradient_that_is_not_finite_on_one_rank_is_a_step_without_update_on_all() -> None:
    layouts = {"tp2": (2, False), "dp2": (1, False), "dp2-sharded": (1, True)}
    cases = {f"{name} {p}": (*layout, p) for name, layout in layouts.items() for p in (True, False)}
    found = run_cases(five_steps, 2, cases)
    for name in layouts:
        for (skipped, weights), (_, truth) in zip(found[f"{name} True"], found[f"{name} False"], strict=True):
            assert skipped == [False, False, True, False, False]
            assert all(torch.equal(a, b) for a, b in zip(weights, truth, strict=True)), name


@pytest.mark.fast
def test_a_skipped_batch_is_written_down_and_runs_of_them_are_counted(tmp_path: Path) -> None:
    tree = {"run_dir": str(tmp_path), "model": model_config(SMALL).model_dump(), "train": {"skip": {}, "steps": 9}}
    state = RunState(stages=plan({0: Settings((), 32, 8, "1,0,0", False, None, 1234)}, 9))
    skipping = Skipping(Config.model_validate(tree), state, Mesh(), CPU)
    rows = []
    for skip in (False, True, True, False, True):
        state.step += 1
        if skip:
            skipping.note(state.step, loss=2.0, grad_norm=float("nan"), compared_with=skipping.guard.state())
        rows.append(state.skipped_in_a_row(state.step))
    assert rows == [0, 1, 2, 0, 1]
    assert state.skipped == [2, 3, 5]
    written = json.loads((tmp_path / "skipped" / "step_00000003.json").read_text(), parse_constant=pytest.fail)
    assert (written["samples"], written["loss"], written["grad_norm"]) == ([16, 24], 2.0, "nan")
    assert sorted(f.name for f in (tmp_path / "skipped").iterdir()) == [f"step_{n:08}.json" for n in (2, 3, 5)]


def test_a_run_that_goes_wrong_skips_and_ends(tmp_path: Path, prefix: Path) -> None:  # noqa: F811
    path = config(
        tmp_path,
        prefix,
        train={"skip": {"window": 8, "stop_after": 3}},
        optim={"schedule": "constant", "warmup_steps": 0, "decay_steps": 0},
        checkpoint={"every": 1},
    )
    train(path, "train.steps=5")
    done = train(path, "optim.lr=10", check=False)  # the update of step 6 ruins the weights
    assert done.returncode == 1
    assert "step 9: 3 updates in a row were left out" in done.stderr
    assert "Traceback" not in done.stderr
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [False] * 6 + [True] * 3
    assert sorted(f.name for f in (tmp_path / "run" / "skipped").iterdir()) == [f"step_{n:08}.json" for n in (7, 8, 9)]
    state = native.read_state(tmp_path / "run" / "checkpoints" / "step_00000008")
    assert state["skipped_batches"] == [7, 8]
    assert state["guard"]["losses"] == [row["loss"] for row in rows[:6]], "what was skipped is not compared with"


# ---- rewind ----


def train_here(path: Path, *overrides: str, bad: tuple[int, ...] = ()) -> RunState:
    """The training command in this process; the gradient of the `bad` steps is not finite."""
    settings = load_config(path, list(overrides))
    validate(settings, 1)
    with environment(settings) as (mesh, device):
        return train_poisoned(Trainer(settings, mesh, device), bad)


def train_poisoned(trainer: Trainer, bad: tuple[int, ...]) -> RunState:
    weight = next(iter(named_parameters(trainer.model).values()))
    weight.register_hook(lambda g: g * (float("nan") if trainer.state.step + 1 in bad else 1.0))
    trainer.run()
    return trainer.state


REWIND = ["train.skip={window: 8, stop_after: 3, on_stop: rewind, rewind_before: 1}", "checkpoint.every=2"]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, prefix: Path) -> Path:  # noqa: F811
    """A run told beforehand to leave out what the others learn to leave out."""
    folder = tmp_path_factory.mktemp("told")
    train_here(config(folder, prefix), "train.skip={window: 8, steps: [6, 7, 8, 9]}", "checkpoint.every=2")
    return folder / "run"


def same_rows(run: Path, told: Path) -> bool:
    names = ("step", "loss", "grad_norm", "lr", "tokens", "skipped")
    a, b = ([[row[n] for n in names] for row in read_rows(r / "metrics.jsonl")] for r in (run, told))
    return a == b


def test_a_rewound_run_equals_one_told_beforehand_what_to_leave_out(
    tmp_path: Path,
    prefix: Path,  # noqa: F811
    told: Path,
) -> None:
    path, run = config(tmp_path, prefix), tmp_path / "run"
    state = train_here(path, *REWIND, bad=(7, 8, 9))
    assert (state.rewinds, state.left_out, state.skipped) == (1, [6, 7, 8, 9], [])
    assert same_rows(run, told)
    assert same_checkpoints(run, told)
    rows = read_rows(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["step"] for row in rows if row.get("left_out")] == [6, 7, 8, 9]
    assert rows[-1]["tokens"] == 8 * 256
    (entry,) = json.loads((run / "skipped" / "rewinds.json").read_text())
    assert entry == {"at_step": 9, "to_step": 4, "left_out": [6, 7, 8, 9]}
    saved = native.read_state(folders.resolve(run))
    assert (saved["left_out_batches"], saved["rewinds"]) == ([6, 7, 8, 9], 1)
    assert saved["guard"] == native.read_state(folders.resolve(told))["guard"]
    # As if killed after the steps left out, and right after going back, when no checkpoint knows of it yet.
    for step in (10, 4):
        for later in folders.list_checkpoints(run)[step // 2 :]:
            shutil.rmtree(later)
        (run / "checkpoints" / "latest").write_text(f"step_{step:08}\n")
        assert train_here(path, *REWIND).rewinds == 1
        assert same_rows(run, told)
        assert same_checkpoints(run, told)


def rewinds_on_ranks(rank: int, world: int, path: str) -> tuple[int, list[int]]:
    settings = load_config(path, [*REWIND, "parallel.sharded_optimizer=true"])
    state = train_poisoned(Trainer(settings, create_mesh(), CPU), (7, 8, 9) if rank == 1 else ())
    return state.rewinds, state.left_out


def test_all_ranks_rewind_together(tmp_path: Path, prefix: Path, told: Path) -> None:  # noqa: F811
    path = config(tmp_path, prefix)
    assert run_ranks(rewinds_on_ranks, 2, str(path)) == [(1, [6, 7, 8, 9])] * 2
    found, truth = ([row["loss"] for row in read_rows(r / "metrics.jsonl")] for r in (tmp_path / "run", told))
    assert found[5:9] == truth[5:9] == [None] * 4
    assert found[:5] + found[9:] == pytest.approx(truth[:5] + truth[9:], rel=1e-5)


def test_a_run_cannot_rewind_for_ever_nor_without_a_checkpoint(tmp_path: Path, prefix: Path) -> None:  # noqa: F811
    path = config(tmp_path, prefix)
    with pytest.raises(Failure, match=r"step 9: 3 updates in a row .* after 0 rewinds, train.skip.max_rewinds=0"):
        train_here(
            path, "train.skip={stop_after: 3, on_stop: rewind, max_rewinds: 0}", "checkpoint.every=2", bad=(7, 8, 9)
        )
    early = config(tmp_path, prefix, name="early")
    with pytest.raises(Failure, match="there is no checkpoint from before step 1 to go back to"):
        train_here(early, *REWIND, bad=(1, 2, 3))
