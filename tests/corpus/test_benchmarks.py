"""Reading the tasks of benchmarks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from opencoder.corpus import benchmarks
from opencoder.corpus.benchmarks import BenchmarkTask, load_benchmark
from opencoder.corpus_config import BenchmarkFields
from opencoder.errors import DataError, UserError
from tests.corpus.documents import write

pytestmark = pytest.mark.fast

MBPP = {"task_id": 7, "text": "Write a function.", "code": "def helper(): pass\ndef first_of(x): return x",
        "test_list": ["assert first_of(1) == 1", "assert first_of(2) == 2"]}  # fmt: skip


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_fields_of_other_benchmarks(tmp_path: Path, suffix: str) -> None:
    (task,) = load_benchmark(str(write(tmp_path / f"mbpp.{suffix}", [MBPP])))
    assert task == BenchmarkTask(
        "mbpp", "7", MBPP["text"], MBPP["code"], "assert first_of(1) == 1\nassert first_of(2) == 2", "first_of"
    )
    own = write(tmp_path / f"own.{suffix}", [{"name": "n", "ask": "p"}, {"ask": "q"}])
    fields = BenchmarkFields(task_id=["name"], prompt=["ask"])
    assert [(t.id, t.prompt) for t in load_benchmark(str(own), fields)] == [("n", "p"), ("own/1", "q")]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (["{}"], "line 1 has none of the fields prompt, text"),
        (['{"prompt": "a"}', "{broken"], "line 2 is not JSON"),
        (['{"prompt": "a"}', "", "[1]"], "line 3 is a JSON list, not an object"),
        (["", "[" * 100_000], "line 2 is nested too deeply"),
        (['{"task_id": 1, "prompt": "a"}'] * 2, "line 2: task 1 stands in line 1 too"),
        (['{"prompt": 5}'], "line 1: `prompt` is a int"),
        ([], "holds no task"),
    ],
)
def test_a_broken_benchmark_is_named_with_its_line(tmp_path: Path, rows: list[Any], says: str) -> None:
    with pytest.raises(DataError, match=re.escape(says)):
        load_benchmark(str(write(tmp_path / "b.jsonl", rows)))


def test_a_line_beyond_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "b.jsonl", ['{"prompt": "a"}', '{"prompt": "ab"}'])
    monkeypatch.setattr(benchmarks, "MAX_LINE", len(path.read_bytes().splitlines(keepends=True)[1]))
    assert len(load_benchmark(str(path))) == 2
    monkeypatch.setattr(benchmarks, "MAX_LINE", benchmarks.MAX_LINE - 1)
    with pytest.raises(DataError, match=f"line 2 is longer than {benchmarks.MAX_LINE} bytes"):
        load_benchmark(str(path))


def test_a_benchmark_that_is_cut_off_or_missing(tmp_path: Path) -> None:
    path = write(tmp_path / "b.jsonl.gz", [{"prompt": str(i)} for i in range(999)])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="damaged or cut off"):
        load_benchmark(str(path))
    with pytest.raises(UserError, match="does not exist"):
        load_benchmark(str(tmp_path / "absent.jsonl"))
    with pytest.raises(UserError, match="allowed are humaneval and files"):
        load_benchmark("mbpp")
