"""How near-duplicates are compared with what is kept in their place, wherever its text lies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opencoder.corpus import dedup
from opencoder.corpus.stages.near import PAIR_CHARS, compare
from opencoder.corpus.stages.shards import texts_at

from .test_build import build, good, rows
from .test_build_stages import sources


@pytest.mark.parametrize("shard_bytes", [1, 3000, 16_000_000])
def test_the_value_of_a_near_duplicate_is_its_true_similarity(shard_bytes: int, tmp_path: Path) -> None:
    files = {f"{n:02d}-{m}.py": good(n) + f"# {m} {m * 7} {m * 11}\n" * m for n in range(9) for m in range(4)}
    root = sources(tmp_path / "src", files)
    old = sources(tmp_path / "old", {"old.py": good(0)})
    options = ("dedup.preset=bigcode", "transform.enabled=false", f"shard_bytes={shard_bytes}")
    build([old], tmp_path / "first", *options)
    report = build([root], tmp_path / "out", *options, f"dedup.against=['{tmp_path / 'first'}']")
    files["old.py"] = good(0)
    near = [row for row in rows(tmp_path / "out", "dropped") if row["stage"] == "fuzzy_dedup"]
    assert len(near) >= 20
    for row in near:
        true = dedup.jaccard(files[row["path"]], files[row["kept_path"]], 5)
        assert row["value"] == pytest.approx(true, abs=1e-8)
    example = report["clusters"]["examples"][0]
    assert example["jaccard"] == min(row["value"] for row in near)
    assert (example["excerpt"], example["kept_excerpt"]) == tuple(
        files[example[name]][:1500] for name in ("path", "kept_path")
    )


def test_near_duplicates_are_compared_with_kept_files_in_any_order(tmp_path: Path) -> None:
    """Row groups of two, the kept files asked for from the last to the first, one of them twice."""
    texts = [good(n) for n in range(7)]
    schema = pa.schema([("text", pa.large_string())])
    with pq.ParquetWriter(tmp_path / "kept.parquet", schema) as writer:
        for n in range(0, 7, 2):
            writer.write_table(pa.table({"text": texts[n : n + 2]}, schema=schema))
    places = [6, 4, 4, 3, 0]
    near = [{"place": i, "kept_file": "kept.parquet", "kept_place": n, "jaccard": None} for i, n in enumerate(places)]
    mine = [texts[n] + f"# {i} {i * 3}\n" for i, n in enumerate(places)]
    compare(near, mine, tmp_path, 5)
    assert [row["jaccard"] for row in near] == [
        pytest.approx(dedup.jaccard(a, texts[n], 5), abs=1e-8) for a, n in zip(mine, places, strict=True)
    ]
    assert [row["kept_excerpt"] for row in near] == [texts[n][: 2 * PAIR_CHARS] for n in places]


def test_a_damaged_page_of_another_shard_is_noticed(tmp_path: Path) -> None:
    texts = [f"text {n} " * 50 for n in range(100)]
    schema, options = pa.schema([("text", pa.large_string())]), {"write_page_checksum": True, "compression": "none"}
    with pq.ParquetWriter(tmp_path / "a.parquet", schema, **options) as writer:
        for n in range(0, 100, 10):
            writer.write_table(pa.table({"text": texts[n : n + 10]}, schema=schema))
    places = np.array([3, 5, 5, 42, 99])
    found = [
        (int(i), text)
        for which, some in texts_at(tmp_path / "a.parquet", places)
        for i, text in zip(which, some, strict=True)
    ]
    assert found == [(i, texts[place]) for i, place in enumerate(places)]
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    at = data.index(b"text 42 ")
    data[at] ^= 1
    (tmp_path / "a.parquet").write_bytes(bytes(data))
    with pytest.raises(OSError, match="CRC"):
        list(texts_at(tmp_path / "a.parquet", places))
    assert list(texts_at(tmp_path / "a.parquet", places[:3]))
