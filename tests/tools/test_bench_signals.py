"""The part of bench-corpus about signals: what it reads, and that its rows are rates of what it read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opencoder.errors import Failure
from opencoder.tools import bench_corpus, bench_signals

pytestmark = pytest.mark.fast
PYTHON = "".join(f"value_{i} = compute({i}, other_{i})\n" for i in range(20))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(4):
        (tmp_path / f"{i}.py").write_text(PYTHON)
        (tmp_path / f"{i}.rs").write_text("fn main() {}\n" * 20)
    (tmp_path / "what.xyzzy").write_text("?")
    return tmp_path


def test_only_files_with_signals_are_read(folder: Path) -> None:
    files = bench_signals.read_files([str(folder)], 1.0)
    assert {f.path for f in files} == {f"{i}.{e}" for i in range(4) for e in ("py", "rs")}
    assert len(bench_signals.read_files([str(folder)], 1e-3)) < 8


def test_rows_tell_parsed_languages_apart(folder: Path) -> None:
    files = bench_signals.read_files([str(folder)], 1.0)
    rows = {row["name"]: row for row in bench_signals.measure(files, 1)}
    assert rows["signals + verdicts, all files"]["files"] == 8
    assert rows["signals + verdicts, no parser rule"]["files"] == rows["signals + verdicts, python"]["files"] == 4
    assert all(row["mb_per_s"] > 0 for row in rows.values())
    assert "signals + verdicts, html" not in rows
    assert len(bench_signals.table(list(rows.values())).splitlines()) == len(rows)


def test_no_file_with_signals_is_told(tmp_path: Path) -> None:
    with pytest.raises(Failure, match="no file with signals"):
        bench_signals.read_files([str(tmp_path)], 1.0)


def test_the_command_writes_its_numbers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "rates.json"
    argv = ["--only", "signals", "--input", str(folder), "--rounds", "1", "--json", str(out)]
    assert bench_corpus.main(argv) == 0
    assert "signals + verdicts, all files" in capsys.readouterr().out
    assert json.loads(out.read_text())["signals"][0]["files"] == 8
