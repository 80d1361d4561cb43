"""docs/parallelism.md says what the program says: the picture of the mesh, the dry runs, the table of measurements."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from opencoder.parallel.mesh import create_mesh
from opencoder.tools.bench_estimate import LAYOUTS, RESIDENT_GOAL, TENSORS_GOAL
from opencoder.train.__main__ import main
from tests.harness import run_ranks

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "parallelism.md").read_text(encoding="utf-8")


def groups_of(rank: int, world: int) -> dict[str, tuple[int, ...]]:
    mesh = create_mesh(tp=2, pp=2)
    return {"tp": mesh.tp.ranks, "dp": mesh.dp.ranks, "pp": mesh.pp.ranks}


def test_the_picture_and_the_groups_are_those_of_the_mesh() -> None:
    found = run_ranks(groups_of, 8)
    for axis in ("tp", "dp", "pp"):
        row = re.search(rf"^\| {axis} \| ([\d ,]+) \|", PAGE, re.MULTILINE)
        assert row is not None
        told = {tuple(map(int, group.split())) for group in row[1].split(",")}
        assert told == {groups[axis] for groups in found}
    drawn = [
        [int(n) for n in re.findall(r"rank (\d+)", line)] for line in re.findall(r"^dp \d .*$", PAGE, re.MULTILINE)
    ]
    # A line is a place in dp; in it tp goes from left to right within pp.
    for line in drawn:
        assert [found[rank]["tp"] for rank in line] == [tuple(line[:2])] * 2 + [tuple(line[2:])] * 2
        assert [found[rank]["pp"] for rank in line] == [(line[0], line[2]), (line[1], line[3])] * 2
    for column in zip(*drawn, strict=True):
        assert {found[rank]["dp"] for rank in column} == {column}


DRY_RUNS = re.findall(r"^```\n\$ opencoder train (.*)\n((?:.*\n)*?)```$", PAGE, re.MULTILINE)


def test_the_page_has_both_models() -> None:
    assert len(DRY_RUNS) >= 2
    assert {"1.5b" in command for command, _ in DRY_RUNS} == {True, False}


@pytest.mark.parametrize(("command", "output"), DRY_RUNS)
def test_dry_runs_print_what_the_page_says(
    command: str, output: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert "--dry-run" in command
    assert main(shlex.split(command)) == 0
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines() if not line.startswith("kernels on")]
    assert output.splitlines() == printed


def test_measurements_are_those_of_the_bench_and_within_its_bounds() -> None:
    rows = re.findall(
        r"^\| ([^|]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", PAGE, re.MULTILINE
    )
    assert len(rows) >= 7
    for name, *numbers in rows:
        assert name in LAYOUTS
        foretold, tensors, of_tensors, resident, of_resident = map(float, numbers)
        assert tensors >= 1
        assert of_tensors == pytest.approx(foretold / tensors, abs=0.012)
        assert of_resident == pytest.approx(foretold / resident, abs=0.012)
        assert abs(of_tensors - 1) <= TENSORS_GOAL
        assert abs(of_resident - 1) <= RESIDENT_GOAL
