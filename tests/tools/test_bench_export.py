"""bench-export exports a real checkpoint and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from opencoder.tools import bench_export


def test_time_and_memory_are_those_of_the_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "bench"
    argv = ["--folder", str(folder), "--preset", "opencoder-1.5b", "--layers", "1", "--shard-mb", "500"]
    # one layer still has two tables of 433 MB
    assert bench_export.main(argv) == 0
    out = capsys.readouterr().out
    assert "in 3 files" in out
    assert out.count("|") >= 15
    assert not folder.exists()


def test_goals_are_met_or_not() -> None:
    found = {"seconds": 181.0, "extra_bytes": 130, "bytes": 300, "largest": 100, "files": 3}
    lines = bench_export.table(found).splitlines()
    assert lines[2].endswith("short |")
    assert lines[3].endswith("met |")
    assert bench_export.table({**found, "extra_bytes": 131}).splitlines()[3].endswith("short |")
