"""bench-sources runs on a little text and measures both sides of every form."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from opencoder.tools.bench_sources import main


def test_every_form_is_measured(tmp_path: Path) -> None:
    assert main(["--megabytes", "0.3", "--rounds", "1", "--json", str(tmp_path / "x.json")]) == 0
    rates = json.loads((tmp_path / "x.json").read_text())["mb_per_s"]
    assert {"files", "a.tar", "a.tar.gz", "a.tar.zst", "a.tar.xz", "a.zip", "a.jsonl", "a.parquet"} <= set(rates)
    assert ("repository" in rates) == (shutil.which("git") is not None)
    assert all(side > 0 for row in rates.values() for side in row.values())
