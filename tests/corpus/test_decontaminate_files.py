"""Decontamination of files of documents, and its command."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opencoder.corpus.decontaminate_files import decontaminate_files
from opencoder.corpus_config import DecontaminateConfig
from opencoder.errors import DataError, UserError
from opencoder.tools import decontaminate as command
from tests.corpus.documents import rows_of, write
from tests.corpus.test_decontaminate import PROSE, TASKS

pytestmark = pytest.mark.fast


@pytest.fixture
def benchmark_path(tmp_path: Path) -> Path:
    rows = [{"task_id": t.id, "prompt": t.prompt, "solution": t.solution, "test": t.test} for t in TASKS[:2]]
    return write(tmp_path / "made.jsonl", rows)


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "jsonl.gz", "jsonl.zst"])
def test_documents_are_kept_or_dropped(tmp_path: Path, benchmark_path: Path, suffix: str) -> None:
    rows = [{"id": str(i), "text": PROSE + (TASKS[0].prompt if i % 3 == 1 else str(i)), "n": i} for i in range(2000)]
    source = tmp_path / f"data.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), source)
    else:
        write(source, rows)
    config = DecontaminateConfig(against=[str(benchmark_path)])
    report = decontaminate_files([str(source)], tmp_path / "out", config)
    clean = rows_of(tmp_path / "out" / "clean" / f"data.{suffix}")
    assert clean == [row for i, row in enumerate(rows) if i % 3 != 1]
    assert report["counts"] == {
        "documents": 2000,
        "contaminated": 667,
        "matches": 667,
        "spans_left_out": 0,
        "kept": 1333,
    }
    matches = rows_of(tmp_path / "out" / "matches.parquet")
    first = matches[0]
    assert (first["file"], first["row"], first["id"], first["task"]) == (f"data.{suffix}", 1, "1", "made/0")
    assert (first["side"], first["line"]) == ("prompt", 4)
    assert rows[1]["text"][first["start"] : first["end"]] == first["excerpt"]
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert report["documents_by_task"] == [{"benchmark": "made", "task": "made/0", "documents": 667}]


def test_the_result_is_repeatable(tmp_path: Path, benchmark_path: Path) -> None:
    source = write(tmp_path / "data.jsonl.gz", [{"text": PROSE + TASKS[0].test}, {"text": "clean"}])
    config = DecontaminateConfig(against=[str(benchmark_path)])
    for name in ("a", "b"):
        decontaminate_files([str(source)], tmp_path / name, config)
    for path in (tmp_path / "a").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"text": "a"}, "{"], "data.jsonl, line 2 is not JSON"),
        ([{"body": "a"}], "row 0 has no column text or content; it has body"),
        ([{"text": "a"}, {"text": None}], "row 1: `text` is a NoneType"),
        (["7"], "line 1 is a JSON int, not an object"),
    ],
)
def test_bad_documents_are_named_and_nothing_is_written(
    tmp_path: Path, benchmark_path: Path, rows: list[Any], says: str
) -> None:
    source = write(tmp_path / "data.jsonl", rows)
    with pytest.raises(DataError, match=re.escape(says)):
        decontaminate_files([str(source)], tmp_path / "out", DecontaminateConfig(against=[str(benchmark_path)]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.jsonl", "made.jsonl"]


def test_what_cannot_be_asked_for(tmp_path: Path, benchmark_path: Path) -> None:
    source = write(tmp_path / "data.jsonl", [{"text": "a"}])
    config = DecontaminateConfig(against=[str(benchmark_path)])

    def refused(says: str, *, inputs: list[Path], output: str = "out", config: DecontaminateConfig = config) -> None:
        with pytest.raises(UserError, match=says):
            decontaminate_files([str(p) for p in inputs], tmp_path / output, config)

    refused("does not exist", inputs=[tmp_path / "absent"])
    refused("allowed are files", inputs=[write(tmp_path / "x.csv", ["a"])])
    (tmp_path / "empty").mkdir()
    refused("holds no file", inputs=[tmp_path / "empty"])
    refused("give a folder as output", inputs=[source], output="matches.jsonl")
    refused("nothing to look for", inputs=[source], config=DecontaminateConfig())
    (tmp_path / "empty" / "data.jsonl").write_text('{"text": "b"}\n')
    refused("two inputs are called data.jsonl", inputs=[source, tmp_path / "empty" / "data.jsonl"])
    refused("not empty and holds no earlier result", inputs=[source], output=".")
    decontaminate_files([str(source)], tmp_path / "out", config)
    refused("holds an earlier result", inputs=[source])
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"cut\.parquet is damaged"):
        decontaminate_files([str(tmp_path / "cut.parquet")], tmp_path / "other", config)


def test_the_command(tmp_path: Path, benchmark_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "data.jsonl", [{"content": PROSE + TASKS[0].test}, {"content": "see tally_marks"}])
    common = ["--input", str(source), "--against", str(benchmark_path)]
    assert command.main([*common, "--output", str(tmp_path / "m.jsonl")]) == 0
    assert [row["side"] for row in rows_of(tmp_path / "m.jsonl")] == ["test"]
    text = capsys.readouterr().out
    assert "made: 1 of 2 tasks found; documents by side: test 1" in text
    assert "2 documents, 1 with a match, 2 kept" in text
    assert command.main([*common, "entry_points=word", "--output", str(tmp_path / "out"), "--action", "drop"]) == 0
    assert "0 kept" not in capsys.readouterr().out
    with pytest.raises(UserError, match="unknown key `ngrams`"):
        command.main([*common, "--output", str(tmp_path / "x"), "ngrams=3"])
    line = [
        sys.executable,
        "-m",
        "opencoder.tools.cli",
        "decontaminate",
        *common,
        "--output",
        str(tmp_path / "y"),
        "--ngram",
        "1",
    ]
    result = subprocess.run(line, capture_output=True, text=True, check=False)
    assert (result.returncode, "`ngram`=1" in result.stderr) == (2, True)
