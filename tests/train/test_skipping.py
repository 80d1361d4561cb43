"""Updates left out: by all ranks together, without a trace in the weights, written down, and a run that has too many ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from opencoder.checkpoint import native
from opencoder.config import Config, OptimConfig
from opencoder.model.decoder import named_parameters
from opencoder.model.initialise import build_model
from opencoder.optim.build import build_optimizer
from opencoder.optim.guard import Guard
from opencoder.parallel.mesh import Mesh, create_mesh
from opencoder.train.skipping import Skipping
from opencoder.train.stages import Settings, plan
from opencoder.train.state import RunState
from opencoder.train.step import StepResult, TrainStep
from tests.harness import run_cases
from tests.model.cases import SMALL, model_config
from tests.parity.cases import Case, micro_batches
from tests.train.test_run import config, prefix, read_rows, train  # noqa: F401  prefix is a fixture

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


def result(loss: float, skip: bool) -> StepResult:
    one = torch.tensor(1.0)
    return StepResult(torch.tensor(loss), torch.tensor(float("nan")), one, one, torch.tensor(skip))


@pytest.mark.fast
def test_a_skipped_batch_is_written_down_and_runs_of_them_are_counted(tmp_path: Path) -> None:
    tree = {"run_dir": str(tmp_path), "model": model_config(SMALL).model_dump(), "train": {"skip": {}, "steps": 9}}
    state = RunState(stages=plan({0: Settings((), 32, 8, "1,0,0", False, None, 1234)}, 9))
    skipping = Skipping(Config.model_validate(tree), state, Mesh(), CPU)
    rows = []
    for skip in (False, True, True, False, True):
        state.step += 1
        skipping.note(result(2.0, skip))
        rows.append(state.skipped_in_a_row())
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
