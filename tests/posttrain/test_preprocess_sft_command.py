"""`opencoder preprocess-sft` with several workers."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from opencoder.tools.preprocess_sft import main
from tests.posttrain.test_preprocess_sft import talk, write_jsonl


def test_workers_change_nothing_and_the_command_tells_what_it_did(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [talk(f"question {i}", "answer " * (i % 17 + 1), id=f"r{i}", language="en") for i in range(600)]
    path = write_jsonl(tmp_path / "in.jsonl", [*rows, b"{"])
    for workers in (1, 2):
        argv = ["--input", path, "--tokenizer", tokenizer, "--output-prefix", tmp_path / str(workers), "--seq-len", 256]
        assert main([*map(str, argv), "--workers", str(workers)]) == 0
        said = capsys.readouterr().out
        assert "600 conversations of 601 rows, 600 answers" in said
        assert "left out: broken_line 1; the first:" in said
        assert "of the places used" in said
    for suffix in ("bin", "idx", "mask", "docs.parquet"):
        one, two = ((tmp_path / f"{workers}.{suffix}").read_bytes() for workers in (1, 2))
        assert one == two, suffix
    assert pq.read_table(tmp_path / "1.docs.parquet").column("id").to_pylist()[:2] == ["r0", "r1"]
