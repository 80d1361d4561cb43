"""`bench-corpus` on a little text: it compares results before it measures, and writes what it printed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from opencoder.corpus import minhash, ngram_index
from opencoder.errors import Failure
from opencoder.native import text_engine
from opencoder.tools import bench_corpus, bench_decontaminate, bench_dedup

pytestmark = pytest.mark.fast
needs_engine = pytest.mark.skipif(text_engine() is None, reason="the C++ text engine was not built")


def test_every_side_has_a_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bench.json"
    sizes = [
        "--megabytes",
        "0.05",
        "--dedup-megabytes",
        "0.3",
        "--signal-megabytes",
        "0.3",
        "--num-perm",
        "64",
        "--rounds",
        "1",
    ]
    assert bench_corpus.main([*sizes, "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert set(found["minhash_mb_per_s"]) >= {"ours affine32", "datasketch affine32", "ours legacy", "ours fast"}
    assert all(rate > 0 for rate in [*found["minhash_mb_per_s"].values(), *found["dedup_mb_per_s"].values()])
    assert found["dedup_set"]["megabytes"] > 0.3
    assert "ours, Python" in found["decontaminate_mb_per_s"]
    assert ("ours, C++" in found["decontaminate_mb_per_s"]) == (text_engine() is not None)
    assert found["decontaminate_set"]["tasks"] > 10
    out = capsys.readouterr().out
    assert "ours affine32" in out
    assert "× datasketch" in out


def test_signatures_that_differ_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    true = minhash.signatures
    monkeypatch.setattr(minhash, "signatures", lambda *args, **kwargs: true(*args, **kwargs) + 1)
    with pytest.raises(Failure, match="affine32: our signatures differ from datasketch's"):
        bench_dedup.minhash_rates(0.01, 16, 1)


@needs_engine
def test_matches_that_differ_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngram_index.PythonIndex, "check", lambda self, lowered, most: (empty(6), empty(3), 0))
    with pytest.raises(Failure, match="finds other places"):
        bench_decontaminate.decontaminate_rates(0.05, 1)


def empty(columns: int) -> NDArray[np.int64]:
    return np.empty((0, columns), np.int64)
