"""The training command with cp: the losses of one process, and checkpoints that go on at another layout."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from opencoder.train.metrics import read_rows
from tests.train.test_run import config, losses, prefix, train

__all__ = ["prefix"]  # a fixture
SETTINGS = {
    "data": {"document_mask": True},
    "train": {"steps": 6, "eval_every": 3, "eval_samples": 8, "precision": "fp64"},
    "optim": {"schedule": "constant"},
    "checkpoint": {"every": 3},
}


@pytest.mark.parametrize("kind", ["ring", "ulysses"])
def test_a_run_over_cp_equals_one_process_and_goes_on_as_one(tmp_path: Path, prefix: Path, kind: str) -> None:
    one = config(tmp_path, prefix, "one", **SETTINGS)
    two = config(tmp_path, prefix, "two", **SETTINGS)
    train(one)
    train(two, "parallel.cp=2", f"parallel.context_attention={kind}", ranks=2)
    expected = both_losses(tmp_path / "one")
    assert len(expected) == 6 + 2
    assert both_losses(tmp_path / "two") == pytest.approx(expected, rel=1e-11)
    # Back to step 3, and on in one process.
    checkpoints = tmp_path / "two" / "checkpoints"
    shutil.rmtree(checkpoints / "step_00000006")
    (checkpoints / "latest").write_text("step_00000003\n")
    assert "step_00000003" in train(two).stdout
    assert losses(tmp_path / "two") == pytest.approx(expected[:6], rel=1e-11)


def both_losses(run: Path) -> list[float]:
    """Of every step, and of every evaluation."""
    return losses(run) + [row["valid_loss"] for row in read_rows(run / "metrics.jsonl") if "valid_loss" in row]
