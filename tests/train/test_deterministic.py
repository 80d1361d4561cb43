"""The same run twice gives the same bits, over tp and dp with a split optimizer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from opencoder.config import Config
from opencoder.parallel.mesh import create_mesh
from opencoder.train.environment import set_determinism
from opencoder.train.loop import Trainer
from opencoder.train.metrics import read_rows
from tests.data.test_groups import blend
from tests.harness import run_cases
from tests.model.cases import SMALL
from tests.train.test_run import same_checkpoints

PARALLEL = {"tp": 2, "sequence_parallel": True, "sharded_optimizer": True}
MEASURED = {"tokens_per_s", "mfu", "mem_gib", "data_wait_s", "step_s", "save_wait_s", "comm_wait_s"}


def trained(rank: int, world: int, settings: dict[str, Any]) -> tuple[bool, str | None]:
    config = Config.model_validate(settings)
    set_determinism(config.train)
    Trainer(config, create_mesh(tp=config.parallel.tp), torch.device("cpu")).run()
    return torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")


def test_two_runs_over_tp_and_dp_give_the_same_bits(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "model": SMALL,
        "parallel": PARALLEL,
        "data": {
            "blend": [{"prefix": prefix, "weight": weight} for prefix, weight in blend(tmp_path)],
            "seq_len": 32, "document_mask": True,
        },
        "train": {
            "steps": 4, "global_batch_size": 8, "micro_batch_size": 2, "precision": "bf16", "device": "cpu",
            "deterministic": True,
        },
        "optim": {"lr": 1e-2, "schedule": "constant"},
        "log": {"tensorboard": False, "peak_tflops": 1.0},
    }  # fmt: skip
    found = run_cases(trained, 4, {n: ({**settings, "run_dir": str(tmp_path / n)},) for n in ("first", "second")})
    rows = []
    for name in ("first", "second"):
        assert found[name] == [(True, ":4096:8")] * 4
        read = read_rows(tmp_path / name / "metrics.jsonl")
        rows.append([{key: value for key, value in row.items() if key not in MEASURED} for row in read])
    assert rows[0] == rows[1]
    assert len({row["loss"] for row in rows[0]}) == 4
    assert same_checkpoints(tmp_path / "first", tmp_path / "second")
