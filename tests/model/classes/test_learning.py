"""What a selection costs in accuracy, on siblings that are easily confused (sheet 2.8)."""

from __future__ import annotations

from typing import Any

import pytest

from opencoder.tools import bench_classification
from opencoder.tools.class_bench.learning import METHODS, Task, compare, learn, rate_at


def test_the_rate_rises_and_falls() -> None:
    task = Task(steps=100, warmup=0.1)
    rates = [rate_at(step, task) for step in range(100)]
    assert max(rates) == rates[10] == 1.0
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.001


def test_a_small_head_learns_and_the_graph_misses_less() -> None:
    """400 classes, rho 0.375: the 150 scored rows cover the siblings of a batch's 8 labels, with or without the uniform share."""
    task = Task(classes=400, batch=8, steps=700, rebuild=100, rho=0.375, test=1000)
    full, random, knn = (learn(METHODS[name], task, 0) for name in ("full", "random", "knn"))
    assert full["top1"] >= 0.95
    assert full["missing_mass"] == 0
    assert knn["missing_mass"] < 0.85 * random["missing_mass"]
    assert knn["top1"] > random["top1"]


@pytest.mark.slow
def test_27_learning(record_property: Any) -> None:
    """2,000 classes, one seed: the bars of the sheet."""
    task = Task(steps=4000, test=4000)
    found = compare(task, 1, ["full", "random", "knn", "knn, mix 0.3, corrected"])["methods"]
    wide = learn(METHODS["knn"], Task(steps=4000, test=4000, rho=0.3), 0)
    record_property("methods", {name: (row["top1"], row["missing_mass"]) for name, row in found.items()})
    assert found["full"]["top1"] >= 0.995
    assert found["knn"]["top1"] >= 0.98
    assert found["knn"]["missing_mass"] < found["random"]["missing_mass"]
    assert wide["top1"] >= 0.995
    assert found["knn, mix 0.3, corrected"]["behind_full_points"] <= 1.0


def test_the_table_of_the_bench_names_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--learning-classes", "100", "--learning-steps", "60", "--seeds", "1"]
    assert bench_classification.main(["--only", "learning", *sizes]) == 0
    out = capsys.readouterr().out
    assert all(f"\n{name} " in out for name in METHODS)
    assert "within 0.5 points" in out
