"""Tied embeddings over a pipeline: one matrix, on both ends or twice on one rank, through updates and checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed.checkpoint as dcp

from opencoder.checkpoint import folders
from opencoder.config import Config
from opencoder.data.indexed import IndexedWriter
from opencoder.parallel import gradients
from opencoder.train.estimate import estimate
from opencoder.train.metrics import read_rows
from tests.harness import run_cases, run_ranks
from tests.model.cases import SMALL
from tests.parallel.test_pipeline import train
from tests.parity.cases import CASES, Case
from tests.parity.update import Outcome, one_update, worst

ZBV = {"pp": 2, "virtual_stages": 2, "schedule": "zbv"}
STEP_BY_STEP: list[tuple[int, int, dict[str, Any]]] = [
    (4, 2, {"pp": 2, "sharded_optimizer": True}),
    (2, 3, ZBV),
    (1, 4, {}),
]
"""Processes, the step that they go on to, and their layout."""


def tree(folder: Path, **sections: Any) -> dict[str, Any]:
    return {
        "run_dir": str(folder / "run"),
        "model": {**SMALL, "layers": 4, "tie_embeddings": True},
        "data": {"blend": [{"prefix": str(folder / "d")}], "seq_len": 32},
        "train": {"steps": 4, "global_batch_size": 8, "micro_batch_size": 2, "precision": "fp64", "device": "cpu"},
        "optim": {"lr": 1e-2, "schedule": "constant"},
        "log": {"tensorboard": False, "peak_tflops": 1.0},
        **sections,
    }


def test_a_tied_run_goes_on_at_any_cut_as_one_process_would(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "d", np.uint16) as writer:
        for i in range(60):
            writer.add_document([(3 * i + j) % 250 for j in range(20 + i % 30)])
    settings = tree(tmp_path)
    train(0, 1, {**settings, "run_dir": str(tmp_path / "one")}, 4)
    for world, until, parallel in STEP_BY_STEP:
        given = {**settings, "parallel": parallel}
        run_ranks(train, world, given, until) if world > 1 else train(0, 1, given, until)
        saved = dcp.FileSystemReader(folders.resolve(tmp_path / "run") / "tensors").read_metadata()
        keys = set(saved.state_dict_metadata)
        assert "lm_head.weight" not in keys
        matrix = saved.state_dict_metadata["model.embed_tokens.weight"]
        assert sum(chunk.sizes.numel() for chunk in matrix.chunks) == matrix.size.numel()  # one copy
    rows, truth = (read_rows(tmp_path / name / "metrics.jsonl") for name in ("run", "one"))
    for name in ("loss", "grad_norm"):
        assert [row[name] for row in rows] == pytest.approx([row[name] for row in truth], rel=1e-9), name
    assert len(rows) == 4


def with_small_buckets(rank: int, world: int, case: Case) -> Outcome:
    gradients.BUCKET_BYTES = 1
    return one_update(rank, world, case)


def test_a_matrix_in_two_stages_of_a_rank_is_not_reduced_when_one_of_them_is_done() -> None:
    """The first stage has the embedding alone here: nothing else of it keeps the last stage from being the last to say so."""
    case = CASES["pp2-dp2-sharded-zbv-tied"]
    case = replace(case, parallel={**case.parallel, "layout": [0, 2, 2, 2]})
    found = run_cases(with_small_buckets, 4, {"": (case,)})[""]
    assert max(worst(found, one_update(0, 1, case.truth)).values()) < 1e-11


def test_the_estimate_counts_the_matrix_once_on_a_rank() -> None:
    def parameters(**parallel: Any) -> int:
        model = {**SMALL, "layers": 4, "vocab_size": 50_000, "tie_embeddings": True}
        config = Config.model_validate({**tree(Path()), "model": model, "parallel": parallel})
        return estimate(config, parallel.get("pp", 1)).largest.parameters

    whole = parameters()
    assert 50_048 * 64 < parameters(pp=2) < whole
    assert 50_048 * 64 < parameters(**ZBV) < whole
