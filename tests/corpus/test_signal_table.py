"""`compute-signals`: one row per file, whatever the file, the same with any number of workers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from opencoder.config import load_corpus_config
from opencoder.corpus.signal_table import schema, signal_names, write_signals
from opencoder.tools import compute_signals

PYTHON = '"""A module."""\n\n' + "".join(f"value_{i} = compute({i}, other_{i})\n" for i in range(12))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "in"
    (root / "sub").mkdir(parents=True)
    (root / "a.py").write_text(PYTHON)
    (root / "sub" / "short.rs").write_text("fn main() {}\n")
    (root / "README.md").write_text("# Title\n")
    (root / "table.csv").write_text("1,2\n")
    (root / "what.xyzzy").write_text("?\n")
    (root / "latin.py").write_bytes("x = 'é'".encode("latin-1"))
    (root / "empty.py").write_text("")
    (root / "gone.py").symlink_to(root / "absent")
    return root


def rows(folder: Path, tmp_path: Path, **options: Any) -> dict[str, dict[str, Any]]:
    output = tmp_path / "out.parquet"
    write_signals([str(folder)], output, load_corpus_config(), **options)
    return {row["path"]: row for row in pq.read_table(output).to_pylist()}


def test_every_file_has_a_row(folder: Path, tmp_path: Path) -> None:
    found = rows(folder, tmp_path)
    assert list(found) == sorted(found)
    assert set(found) == {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}
    kept = found["a.py"]
    assert kept["keep"] is True
    assert (kept["language"], kept["doc_type"], kept["hits"], kept["errors"]) == ("python", "code", [], [])
    assert kept["qsc_code_num_lines"] == 14.0
    assert kept["qsc_code_cate_autogen"] == 0.0
    assert kept["qsc_doc_num_words"] is None
    short = found["sub/short.rs"]
    assert short["keep"] is False
    assert "qsc_code_num_lines" in short["hits"]
    assert found["README.md"]["qsc_doc_num_lines"] == 1.0
    assert (found["table.csv"]["doc_type"], found["what.xyzzy"]["doc_type"]) == ("excluded", "unknown")
    for name in ("table.csv", "what.xyzzy", "latin.py", "gone.py", "empty.py"):
        assert found[name]["keep"] is False
        assert all(found[name][signal] is None for signal in signal_names())
    assert found["latin.py"]["errors"] == ["file: encoding: 5 (not UTF-8 (value: first bad byte))"]
    assert found["gone.py"]["errors"] == ["file: cannot be read: No such file or directory"]
    assert found["empty.py"]["errors"] == ["file: empty: 0 (= 0 bytes)"]


def test_compat_mode_takes_empty_files_and_draws_from_the_name(folder: Path, tmp_path: Path) -> None:
    found = rows(folder, tmp_path, compat=True)
    assert found["empty.py"]["qsc_code_num_chars"] == 0.0
    assert found["empty.py"]["errors"] == []
    assert found["latin.py"]["errors"] != []


def test_the_table_does_not_depend_on_workers(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opencoder.corpus.signal_table.TASK_FILES", 2)
    one = rows(folder, tmp_path)
    assert rows(folder, tmp_path, workers=2) == one


def test_containers_give_a_row_per_document(tmp_path: Path) -> None:
    source = tmp_path / "docs.jsonl"
    documents = [{"text": PYTHON, "path": "x.py"}, {"text": "a\n", "path": "y.csv"}, {"text": 3, "path": "z.py"}]
    source.write_text("".join(json.dumps(d) + "\n" for d in documents))
    found = rows(source, tmp_path)
    assert found["x.py"]["keep"] is True
    assert found["y.csv"]["errors"] == []
    assert "the text is int" in found["z.py"]["errors"][0]


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "made" / "s.parquet"
    assert compute_signals.main(["--input", str(folder), "--output", str(output), "--workers", "1"]) == 0
    assert pq.read_schema(output).names == schema().names
    assert "8 files: 1 kept, 7 dropped (5 of them without signals), 3 with errors" in capsys.readouterr().out
    for wrong in (["--output", "x.csv"], ["--output", str(output), "--workers", "0"]):
        with pytest.raises(Exception, match=r"must (be|end)"):
            compute_signals.main(["--input", str(folder), *wrong])
    with pytest.raises(Exception, match="does not exist"):
        compute_signals.main(["--input", str(tmp_path / "absent"), "--output", str(output)])
