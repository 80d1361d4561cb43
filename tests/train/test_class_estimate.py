"""The estimate of `train --dry-run` for a class head: against what ranks hold, and the peak of live tensors in real steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opencoder.config import Config, validate
from opencoder.data.classification_writer import ClassificationWriter
from opencoder.tools.bench_estimate import TensorPeak
from opencoder.train.estimate import describe, estimate
from tests.harness import run_ranks
from tests.train.class_cases import trainer_of, tree

CLASSES = 60_001


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("classes")
    r = np.random.default_rng(0)
    with ClassificationWriter(path / "features", "features", width=12, classes=CLASSES) as writer:
        writer.add_features(r.standard_normal((256, 12)).astype(np.float32), r.integers(0, CLASSES, 256))
    return path


def measured(rank: int, world: int, given: dict[str, Any]) -> tuple[int, int]:
    """Bytes of weights, gradients of the encoder and state; the peak of live tensors over two updates."""
    with TensorPeak() as tensors:
        trainer = trainer_of(given, world)
        batches = trainer.data.batches(0)
        for step in range(2):
            if trainer.graph is not None:
                trainer.graph.before_step(step)
            trainer.train_step.update(next(batches)[1], lr=1e-3)
    return trainer.optimizer.state_bytes(), tensors.bytes


@pytest.mark.parametrize(
    ("head", "precision", "peak_too"),
    [
        ({"selection": "full"}, "fp32", True),
        ({"selection": "random", "rho": 0.5, "optimizer": "sgd"}, "fp32", True),
        ({"selection": "random", "rho": 0.5, "state_dtype": "bf16"}, "bf16", False),
        ({"selection": "full", "class_group": "world"}, "bf16", False),
    ],
)
def test_the_estimate_is_what_ranks_hold(
    head: dict[str, Any], precision: str, peak_too: bool, folder: Path, tmp_path: Path
) -> None:
    given = tree(folder, str(tmp_path / "r"), features=True, head={"classes": CLASSES, "dim": 64, **head})
    given["train"] |= {"precision": precision, "global_batch_size": 256, "micro_batch_size": 128}
    config = Config.model_validate(given)
    validate(config, 2)
    (found,) = estimate(config, 2, cuda=False).ranks
    held, peak = run_ranks(measured, 2, given)[0]
    weights = found.peak.weights + found.peak.optimizer
    wide = 4 * (found.parameters - -(-CLASSES // 2) * 64)  # gradients of the encoder
    assert held == weights + wide
    if peak_too:
        assert peak == pytest.approx(found.peak.total, rel=0.15)


def test_the_dry_run_tells_of_the_class_matrix(folder: Path, tmp_path: Path) -> None:
    """100 million classes on 256 ranks: the sheet's table 8.2 has 0.80 GB for fp32 weights of width 512."""
    head = {"classes": 100_000_000, "dim": 512, "selection": "knn", "neighbours": 150, "rho": 0.1}
    given = tree(folder, str(tmp_path / "r"), features=True, head=head, train={"global_batch_size": 16384})
    given["train"] |= {"micro_batch_size": 64, "precision": "fp32", "device": "cpu"}
    config = Config.model_validate(given)
    validate(config, 256)
    text = describe(config, 256)
    assert "classes           100,000,000 × 512, 390,625 per rank, 39,063 scored in a step" in text
    own = text.split("sent in a step")[0].splitlines()
    lines = {line[:18].strip(): float(line[18:27]) * 2**30 / 1e9 for line in own if " GiB  " in line}
    assert lines["class matrix"] == pytest.approx(0.80, abs=0.005)
    assert lines["its state"] == pytest.approx(1.60, abs=0.01)
    assert lines["logits"] == pytest.approx(2.56, abs=0.01)  # the sheet's table 2.9
    assert lines["selection"] == pytest.approx(0.23 + 0.12 + 0.40, abs=0.02)  # table 2.4: ids, positions, offsets
