"""Runs of the trainer: the same seed and layout give the same bits again, also to a run that was stopped and resumed, twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from opencoder.checkpoint import native
from opencoder.config import Config
from opencoder.data.indexed import IndexedWriter
from opencoder.parallel.mesh import create_mesh
from opencoder.train.loop import Trainer
from opencoder.train.metrics import read_rows
from tests.harness import run_ranks
from tests.model.cases import SMALL
from tests.parity.update import CPU

STEPS = 3
LAYOUTS: dict[str, tuple[int, dict[str, Any], str]] = {
    "tp2-dp2-zero": (4, {"tp": 2, "sequence_parallel": True, "sharded_optimizer": True}, "fp32"),
    "pp2-zbv": (2, {"pp": 2, "virtual_stages": 2, "schedule": "zbv"}, "bf16"),
    "cp2": (2, {"cp": 2}, "fp32"),
}
"""Ranks, parallel.…, train.precision."""


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "d"
    with IndexedWriter(path, np.uint16) as writer:
        for i in range(80):
            writer.add_document([(3 * i + j) % 250 for j in range(20 + i % 30)])
    return path


def settings(prefix: Path, run_dir: Path, parallel: dict[str, Any], precision: str) -> dict[str, Any]:
    return {
        "run_dir": str(run_dir),
        "model": {**SMALL, "layers": 4},
        "data": {"blend": [{"prefix": str(prefix)}], "seq_len": 32, "document_mask": True, "split": "80,20,0"},
        "train": {
            "steps": STEPS, "global_batch_size": 8, "micro_batch_size": 2, "precision": precision, "eval_every": 1,
            "eval_samples": 4, "device": "cpu",
        },
        "optim": {"lr": 1e-2, "schedule": "constant", "warmup_steps": 2},
        "checkpoint": {"every": 1},
        "parallel": parallel,
        "log": {"tensorboard": False, "peak_tflops": 1.0},
    }  # fmt: skip


def train(rank: int, world: int, runs: list[tuple[dict[str, Any], int]]) -> list[int]:
    """Each run of the list, up to the step beside it; the steps at which they started."""
    started = []
    for tree, until in runs:
        config = Config.model_validate(tree)
        p = config.parallel
        trainer = Trainer(config, create_mesh(tp=p.tp, pp=p.pp, cp=p.cp), CPU)
        started.append(trainer.state.step)
        trainer.total_steps = until
        trainer.run()
    return started


def tensors_of(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    saved = dcp.FileSystemReader(folder / "tensors").read_metadata().state_dict_metadata
    whole = {key: torch.empty(m.size, dtype=m.properties.dtype) for key, m in saved.items()}  # type: ignore[union-attr]
    native.load_whole(folder, whole)
    return whole


def losses(run_dir: Path) -> list[tuple[Any, ...]]:
    return [
        (row["step"], row["loss"], row["grad_norm"], row.get("valid_loss"))
        for row in read_rows(run_dir / "metrics.jsonl")
    ]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_second_run_has_the_same_bits_although_resumed_twice(name: str, prefix: Path, tmp_path: Path) -> None:
    world, parallel, precision = LAYOUTS[name]
    whole, cut = (settings(prefix, tmp_path / run, parallel, precision) for run in ("whole", "cut"))
    runs = [(whole, STEPS), (cut, 1), (cut, 2), (cut, STEPS)]
    assert run_ranks(train, world, runs) == [[0, 0, 1, 2]] * world

    truth = losses(tmp_path / "whole")
    assert [row[0] for row in truth] == list(range(1, STEPS + 1))
    assert losses(tmp_path / "cut") == truth
    for step in (1, 2, 3):
        expected, found = (tensors_of(tmp_path / run, step) for run in ("whole", "cut"))
        assert any(key.startswith("optim.exp_avg_sq.") for key in expected)
        assert expected.keys() == found.keys()
        assert [key for key, t in expected.items() if not torch.equal(t, found[key])] == [], step
    first, last = (tensors_of(tmp_path / "whole", step) for step in (1, 3))
    assert not any(torch.equal(first[key], last[key]) for key in first)
