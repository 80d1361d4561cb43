"""bench-lexing: a row per language and side, and the numbers as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opencoder.native import text_engine
from opencoder.tools import bench_lexing

pytestmark = [pytest.mark.fast, pytest.mark.skipif(text_engine() is None, reason="needs the text engine")]


def test_rows_of_each_language(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = tmp_path / "code"
    code.mkdir()
    (code / "a.py").write_text("import a  # b\nx = 1\n" * 50)
    (code / "b.js").write_text("var a = 1; // b\n" * 50)
    (code / "c.c").write_text("int a; /* b */\n" * 50)
    out = tmp_path / "rows.json"
    arguments = ["--input", str(code), "--rounds", "1", "--megabytes", "1", "--json", str(out)]
    assert bench_lexing.main(arguments) == 0
    rows = json.loads(out.read_text())["rows"]
    found = {(row["language"], row["side"]) for row in rows}
    common = {"lexer", "lexer, compat", "Pygments"}
    assert found == {("python", side) for side in common | {"scanner", "ast.parse"}} | {
        ("javascript", side) for side in common | {"tree-sitter + query", "esprima, compat"}
    } | {("c", side) for side in common | {"scanner"}}
    assert all(row["mb_per_s"] > 0 and row["megabytes"] > 0 for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == len(rows)
