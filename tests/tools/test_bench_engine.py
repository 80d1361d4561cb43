"""bench-engine: a row for each number of workers; the second run skips what the first has done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opencoder.corpus import engine
from opencoder.tools import bench_engine


def test_a_row_for_each_number_of_workers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reports: list[engine.RunReport] = []
    run = engine.run
    monkeypatch.setattr(engine, "run", lambda *args, **options: reports.append(run(*args, **options)))
    file = tmp_path / "rows.json"
    assert bench_engine.main(["--tasks", "6", "--workers", "1", "2", "--json", str(file)]) == 0
    assert [(report.done, report.skipped) for report in reports] == [(4, 0), (6, 0), (0, 6), (8, 0), (6, 0), (0, 6)]
    rows = json.loads(file.read_text())["rows"]
    assert set(rows) == {"1", "2"}
    assert all(ms > 0 for row in rows.values() for ms in row.values())
    assert capsys.readouterr().out.splitlines()[1].startswith("2 workers: done ms ")
