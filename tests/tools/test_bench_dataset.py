"""`opencoder bench-dataset`: it measures what it names, beside a peer or without, and compares what both read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from opencoder.data.indexed import IndexedDataset
from opencoder.errors import Failure
from opencoder.tools import bench_dataset

SMALL = ["--rounds", "1", "--reads", "200", "--documents", "100000", "--tokens", "100000000", "--prefixes", "3"]


class Shifted(IndexedDataset):
    """A peer that reads one token too far on."""

    def get(self, i: int, offset: int = 0, length: int | None = None) -> NDArray[np.generic]:
        return super().get(i, offset + 1, length)


def test_numbers_with_a_peer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_dataset, "megatron_dataset", lambda: IndexedDataset)
    assert bench_dataset.main([*SMALL, "--json", str(tmp_path / "n.json")]) == 0
    numbers = json.loads((tmp_path / "n.json").read_text())
    assert set(numbers["reads"]) == {f"{s}, {w}" for s in ("ours", "megatron-core") for w in ("documents", "parts")}
    assert all(numbers["index"][f"peak / arrays, {epochs} epochs"] <= 1.5 for epochs in (1, 3))
    assert 0 < numbers["blend"]["cached"] < numbers["blend"]["first"]
    assert "×" in capsys.readouterr().out


def test_an_absent_peer_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench_dataset, "megatron_dataset", lambda: None)
    assert bench_dataset.main(SMALL) == 0
    assert "megatron-core: not installed, not measured" in capsys.readouterr().out


def test_a_peer_that_reads_something_else_is_no_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_dataset, "megatron_dataset", lambda: Shifted)
    with pytest.raises(Failure, match="read differently"):
        bench_dataset.bench_reads(tmp_path, 100, 1)
