"""bench-hostile: a row for every reader and text, and the growth that it tells."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opencoder.tools import bench_hostile

pytestmark = pytest.mark.fast


def test_a_text_has_about_the_length_asked_for() -> None:
    text = bench_hostile.Hostile("ab", before="<", after="cd", end=">")
    assert text.of(8) == "<ababcdcd>"
    assert text.of(1) == "<abcd>"
    assert text.name == "'<ab…cd>'"


def test_every_reader_has_a_row_for_each_of_its_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    assert bench_hostile.main(["--characters", "400", "--rounds", "1", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert {(row["name"], row["text"]) for row in rows} == {
        (name, text.name) for name, (_, texts) in bench_hostile.subjects().items() for text in texts
    }
    assert all(row["millions_per_s"] > 0 for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == len(bench_hostile.subjects())


def test_quadratic_time_grows_by_sixteen_and_linear_by_four(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = bench_hostile.pieces("a")
    monkeypatch.setattr(bench_hostile, "subjects", lambda: {"linear": (len, texts), "quadratic": (str, texts)})
    monkeypatch.setattr(
        bench_hostile, "seconds", lambda function, text, rounds: len(text) ** (2 if function is str else 1)
    )
    assert {row["name"]: row["growth"] for row in bench_hostile.measure(4000, 1)} == {"linear": 4, "quadratic": 16}
