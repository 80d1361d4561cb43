"""The memory of a class head: the sheet's tables, and what the formula must say at its edges."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opencoder.errors import ConfigError
from opencoder.model.classes.memory import (
    GB,
    RECIPES,
    build_bytes,
    graph_bytes,
    head_memory,
    neighbours_for,
    rho_for,
    weight_bytes,
)
from opencoder.tools import plan_classification

TABLE_8_2 = """
1e6 4   | 0.26 0.51 0.51 1.54 1.31 2.05 2.30
1e6 8   | 0.13 0.26 0.26 0.77 0.65 1.02 1.15
1e7 8   | 1.28 2.56 2.56 7.68 6.53 10.2 11.5
1e7 16  | 0.64 1.28 1.28 3.84 3.26 5.12 5.76
1e8 8   | 12.8 25.6 25.6 76.8 65.3 102 115
1e8 16  | 6.4 12.8 12.8 38.4 32.6 51.2 57.6
1e8 64  | 1.6 3.2 3.2 9.6 8.2 12.8 14.4
1e8 256 | 0.40 0.80 0.80 2.40 2.04 3.20 3.60
"""
ROWS = [line.split("|") for line in TABLE_8_2.strip().splitlines()]
CASES = [
    (int(float(size.split()[0])), int(size.split()[1]), recipe, printed)
    for size, values in ROWS
    for recipe, printed in zip(RECIPES, values.split(), strict=False)
]


@pytest.mark.parametrize(("classes", "ranks", "recipe", "printed"), CASES)
def test_51_every_value_of_table_8_2(classes: int, ranks: int, recipe: str, printed: str) -> None:
    """Within 1 %, or as near as the digits that the sheet prints (0.128 GB stands there as 0.13)."""
    got = weight_bytes(classes, ranks, 512, recipe, rho=0.1) / GB
    decimals = len(printed.partition(".")[2])
    assert abs(got - float(printed)) <= max(0.01 * float(printed), 0.5 * 10**-decimals + 1e-12), got


def test_the_table_has_56_values() -> None:
    assert len(CASES) == 56


@pytest.mark.parametrize(
    ("classes", "ranks", "neighbours", "ids", "positions", "offsets"),
    [
        (10**8, 256, 150, 0.23, 0.12, 0.40),
        (10**8, 256, 1000, 1.56, 0.78, 0.40),
        (10**8, 8, 100, 5.0, 2.5, 0.40),
        (10**7, 8, 100, 0.5, 0.25, 0.04),
        (10**6, 4, 100, 0.10, 0.05, 0.004),
    ],
)
def test_the_graph_of_table_2_4(
    classes: int, ranks: int, neighbours: int, ids: float, positions: float, offsets: float
) -> None:
    for got, want in zip(graph_bytes(classes, ranks, neighbours), (ids, positions, offsets), strict=True):
        assert got / GB == pytest.approx(want, abs=0.0051 if want > 0.01 else 1e-4)


def test_wide_offsets() -> None:
    ids, positions, offsets = graph_bytes(10**8, 4, 100)  # 2.5e9 edges
    assert offsets == (10**8 + 1) * 8
    assert ids == 2 * positions


@pytest.mark.parametrize(("ranks", "batch", "full"), [(256, 16_384, 25.6), (16, 4_096, 102), (8, 1_024, 51.2)])
def test_logits_of_table_2_9(ranks: int, batch: int, full: float) -> None:
    plain = head_memory(10**8, ranks, 512, batch=batch, rho=1.0, neighbours=None)
    assert plain.logits / GB == pytest.approx(full, rel=0.01)
    assert head_memory(10**8, ranks, 512, batch=batch, rho=0.1).logits / GB == pytest.approx(full / 10, rel=0.01)
    assert plain.graph == plain.scored_rows == plain.selection == 0


def test_the_total_is_the_sum_and_chunks_bound_logits() -> None:
    memory = head_memory(1003, 4, 32, batch=64, rho=0.25, neighbours=8, recipe="fp32 W", compute_bytes=4)
    scored, rows = 63, 251
    assert memory.logits == 64 * scored * 4
    assert memory.scored_rows == scored * 32 * 4
    edges = 1003 * 8 / 4
    parts = [rows * 32 * 4, 2 * 64 * 32 * 4, scored * 32 * 4, 64 * scored * 4, edges * 4, edges * 2, 1004 * 4, rows * 8]
    assert memory.total == sum(parts)
    assert head_memory(1003, 4, 32, batch=64, rho=0.25, neighbours=8, logit_rows=16).logits == 16 * scored * 4


def test_a_build_holds_blocks_a_copy_and_pairs() -> None:
    """1003 classes on 4 ranks: 251 rows."""
    assert build_bytes(1003, 4, 32, 8, tile_bytes=0) == 251 * (3 * 32 * 4 + 8 * 12)
    assert build_bytes(1003, 4, 32, 8, background=False, tile_bytes=100) == 251 * (2 * 32 * 4 + 8 * 12) + 100
    assert build_bytes(1003, 1, 32, 8, background=False, tile_bytes=0) == 1003 * (32 * 4 + 8 * 12)


def test_k_and_rho_rules_of_2_5() -> None:
    assert neighbours_for(10**8, 0.1, 16_384, uniform_mix=0.2) == pytest.approx(610, abs=1)
    assert rho_for(10**8, 100, 1024, uniform_mix=0.2) == pytest.approx(0.00128)
    assert rho_for(1000, 100, 1024) == 1.0


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="recipe 'fp8' is unknown: choose from fp16 W"):
        weight_bytes(10, 1, 8, "fp8")
    with pytest.raises(ConfigError, match=r"0 < rho"):
        head_memory(1000, 4, 8, rho=0.0)
    with pytest.raises(ConfigError, match="neighbours at most the 1000 classes"):
        head_memory(1000, 4, 8, neighbours=1001)
    with pytest.raises(ConfigError, match="cannot be split over 4 ranks"):
        head_memory(3, 4, 8, neighbours=2)


def test_the_command_prints_the_table_and_says_computed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert plan_classification.main(["--ranks", "8", "256", "--json", str(tmp_path / "plan.json")]) == 0
    out = capsys.readouterr().out
    assert "| 1e+08 / 256 | 0.4 | 0.8 | 0.8 | 2.4 | 2.04 | 3.2 | 3.6 |" in out
    assert out.count("(computed)") == 3
    rows = json.loads((tmp_path / "plan.json").read_text())["plans"]
    assert rows[1]["step_flop"] == 6 * 16_384 * 39_063 * 512  # ⌈1e8 · 0.1 / 256⌉ rows
    with pytest.raises(ConfigError, match="--tflops are positive"):
        plan_classification.main(["--tflops", "0"])
    assert rows[1]["step_s"] == pytest.approx(plan_classification.STEP_OVERHEAD * rows[1]["step_flop"] / 400e12)
    with pytest.raises(ConfigError, match="--overheads at least 1"):
        plan_classification.main(["--overheads", "0.9", "2"])
