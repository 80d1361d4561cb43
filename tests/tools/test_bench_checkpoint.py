"""bench-checkpoint measures every side and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from opencoder.tools import bench_checkpoint


def test_every_side_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "bench"
    assert bench_checkpoint.main(["--folder", str(folder), "--mib", "16", "--tensor-mib", "4", "--rounds", "2"]) == 0
    rows = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert rows[2:] == ["save", "load, nothing cached", "wait for a background save", "training beside its copy"]
    assert not folder.exists()


def test_the_sides_do_what_they_say(tmp_path: Path) -> None:
    best = bench_checkpoint.measure(tmp_path, 16, 4, 1)
    assert set(best) == {"disk write", "disk read", "save", "load", "training", "wait", "meanwhile"}
    assert (tmp_path / "plain").stat().st_size == 16 << 20
    for name in ("save", "wait"):
        (shard,) = (tmp_path / name).rglob("*.distcp")
        assert shard.stat().st_size >= 16 << 20
