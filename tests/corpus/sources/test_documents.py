"""jsonl and parquet: columns of known data sets, damage, and large files in parts."""

from __future__ import annotations

import datetime
import gzip
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from opencoder.corpus.read import check_columns
from opencoder.errors import DataError

from .reading import by_path, config, fates, items, read

pytestmark = pytest.mark.fast
CODE = "print('hello')\n"

STACK_V2: dict[str, Any] = {
    "blob_id": "0" * 40, "directory_id": "1" * 40, "path": "/src/a.py", "content_id": "2" * 40,
    "detected_licenses": ["MIT", "Apache-2.0"], "license_type": "permissive", "repo_name": "owner/name",
    "snapshot_id": "3" * 40, "revision_id": "4" * 40, "branch_name": "refs/heads/main",
    "visit_date": datetime.datetime(2023, 9, 6, 10, 0), "revision_date": datetime.datetime(2022, 1, 1),
    "committer_date": datetime.datetime(2021, 5, 4, 3, 2, 1), "github_id": 12, "star_events_count": 7,
    "fork_events_count": 1, "gha_license_id": "MIT", "gha_language": "Python", "src_encoding": "UTF-8",
    "language": "Python", "is_vendor": False, "is_generated": False, "length_bytes": 15, "extension": "py",
    "content": CODE,
}  # fmt: skip
STACK_V1: dict[str, Any] = {
    "hexsha": "5" * 40, "size": 15, "ext": "py", "lang": "Python", "max_stars_repo_path": "src/a.py",
    "max_stars_repo_name": "owner/name", "max_stars_repo_head_hexsha": "6" * 40, "max_stars_repo_licenses": ["MIT"],
    "max_stars_count": 7, "content": CODE, "avg_line_length": 15.0, "max_line_length": 15, "alphanum_fraction": 0.7,
}  # fmt: skip
REFINECODE: dict[str, Any] = {
    "repo_name": "owner/name", "sub_path": "src/a.py", "file_name": "a.py", "program_lang": "python",
    "doc_type": "code", "text": CODE,
}  # fmt: skip


def parquet(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, default=str) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_columns_of_the_stack_v2(form: str, tmp_path: Path) -> None:
    path = parquet(tmp_path / "d.parquet", [STACK_V2]) if form == "parquet" else jsonl(tmp_path / "d.jsonl", [STACK_V2])
    (record,) = read(path)
    time = datetime.datetime(2021, 5, 4, 3, 2, 1, tzinfo=datetime.UTC)
    assert (record.path, record.repo, record.stars) == ("/src/a.py", "owner/name", 7)
    assert record.commit_time == int(time.timestamp())
    assert (record.licence, record.licence_type, record.blob_id) == ("MIT,Apache-2.0", "permissive", "0" * 40)
    assert (record.language, record.text, record.id) == ("python", CODE, hashlib.sha256(CODE.encode()).hexdigest())


@pytest.mark.parametrize(
    ("row", "licence", "stars"), [(STACK_V1, "MIT", 7), (REFINECODE, None, None)], ids=["stack-v1", "refinecode"]
)
def test_columns_of_other_sets(row: dict[str, Any], licence: str | None, stars: int | None, tmp_path: Path) -> None:
    (record,) = read(parquet(tmp_path / "d.parquet", [row]))
    assert (record.path, record.repo, record.language) == ("src/a.py", "owner/name", "python")
    assert (record.licence, record.stars, record.text) == (licence, stars, CODE)


def test_rows_that_hold_the_files_of_a_repository(tmp_path: Path) -> None:
    files = [{"path": "a.py", "content": CODE, "blob_id": "7" * 40}, {"path": "b.py", "content": CODE * 2}]
    rows = [{"repo_name": "owner/name", "star_events_count": 3, "files": files}]
    found = by_path(read(parquet(tmp_path / "d.parquet", rows)))
    assert {path: (r.repo, r.stars) for path, r in found.items()} == dict.fromkeys(("a.py", "b.py"), ("owner/name", 3))
    assert found["a.py"].blob_id == "7" * 40


def test_a_stated_language_counts_only_where_the_path_says_nothing(tmp_path: Path) -> None:
    rows = [
        {"content": CODE, "path": "a.py", "language": "Ruby"},
        {"content": CODE, "language": "C++"},
        {"content": CODE, "path": "x", "language": "Klingon"},
    ]
    found = read(jsonl(tmp_path / "d.jsonl", rows))
    assert [(r.path, r.language, r.status) for r in found] == [
        ("a.py", "python", "kept"),
        ("d.jsonl:2", "cpp", "kept"),
        ("x", "unknown", "dropped"),
    ]


def test_content_as_bytes_is_hashed_as_it_is(tmp_path: Path) -> None:
    rows = [{"path": "a.py", "content": CODE.encode()}, {"path": "b.py", "content": b"\xff\xfe"}]
    found = by_path(read(parquet(tmp_path / "d.parquet", rows)))
    assert found["a.py"].text == CODE
    assert (found["b.py"].reason, found["b.py"].id) == ("encoding", hashlib.sha256(b"\xff\xfe").hexdigest())


def test_ids_without_contents_are_refused_with_what_to_do(tmp_path: Path) -> None:
    rows = [{key: value for key, value in STACK_V2.items() if key != "content"}]
    (item,) = items(parquet(tmp_path / "d.parquet", rows))
    with pytest.raises(DataError, match="fetch the contents first"):
        check_columns(item)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": 3}, "the text is int, not a string"),
        ({"text": None}, "the text is NoneType, not a string"),
        ({"text": CODE, "stars": "many"}, "`stars` is 'many', not a number"),
        ({"text": CODE, "stars": 1e400}, "not a number"),
        ({"text": CODE, "stars": 10**30}, "not a number of 64 bits"),
        ({"text": CODE, "commit_time": "yesterday"}, "give Unix seconds or ISO 8601"),
        ({"text": CODE, "commit_time": []}, "give Unix seconds or ISO 8601"),
        ({"files": 5}, "not a list of files"),
        ([1], "line 2 is a JSON list, not an object"),
        (5, "line 2 is a JSON int, not an object"),
    ],
)
def test_a_document_with_an_impossible_field_is_failed_by_name(row: Any, reason: str, tmp_path: Path) -> None:
    good = {"text": CODE, "path": "a.py"}
    records = read(jsonl(tmp_path / "d.jsonl", [good, row, good]))
    assert [r.status for r in records] == ["kept", "failed", "kept"]
    assert reason in str(records[1].reason)
    assert "2" in records[1].path


@pytest.mark.parametrize(
    "value", ["2021-05-04T03:02:01", "2021-05-04T03:02:01Z", "2021-05-04 05:02:01+02:00", 1620097321.5, "1620097321"]
)
def test_times_in_every_form(value: Any, tmp_path: Path) -> None:
    (record,) = read(jsonl(tmp_path / "d.jsonl", [{"text": CODE, "path": "a.py", "commit_time": value}]))
    assert record.commit_time == 1620097321


def test_odd_text_in_names_and_contents_reaches_a_table(tmp_path: Path) -> None:
    from opencoder.corpus.read import to_table

    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"text": "x\\ud800", "path": "a.py"}\n{"text": "x", "path": "\\ud800.py", "repo": "\\udcff"}\n')
    records = read(path)
    assert [r.reason for r in records] == ["encoding", None]
    assert to_table(records)["path"].to_pylist() == ["a.py", "\\ud800.py"]


@pytest.mark.parametrize("line", [b"[" * 200_000, b'{"a":' * 100_000], ids=["lists", "objects"])
def test_deep_nesting_is_a_failure_not_a_crash(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(line + b"\n" + json.dumps({"text": CODE, "path": "a.py"}).encode() + b"\n")
    found = fates(read(path))
    assert found["d.jsonl:1"] == ("failed", "line 1 is nested too deeply")
    assert found["a.py"] == ("kept", None)


# ---- parts ----


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=60), max_size=30), st.integers(1, 200), st.booleans())
def test_every_line_is_in_exactly_one_part(texts: list[str], split: int, last_newline: bool) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "d.jsonl"
        data = "\n".join(json.dumps({"text": t, "path": f"{n}.py"}, ensure_ascii=False) for n, t in enumerate(texts))
        path.write_text(data + "\n" * last_newline, encoding="utf-8")
        found = read(path, f"read.split_bytes={split}")
        assert [(r.path, r.id) for r in found] == [
            (f"{n}.py", hashlib.sha256(t.encode()).hexdigest()) for n, t in enumerate(texts)
        ]


def test_documents_without_a_path_are_named_by_their_place(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", [{"text": CODE, "language": "python"}] * 10)
    size = path.stat().st_size // 10
    assert [r.path for r in read(path)] == [f"d.jsonl:{n + 1}" for n in range(10)]
    found = read(path, f"read.split_bytes={size * 3}")
    assert [r.path for r in found] == [f"d.jsonl@{n * size}" for n in range(10)]


def test_a_parquet_file_in_parts_gives_the_same(tmp_path: Path) -> None:
    rows = [{"text": f"x = {n}\n" * 20, "path": f"{n}.py"} for n in range(100)]
    path = parquet(tmp_path / "d.parquet", rows, row_group_size=7)
    assert len(items(path, "read.split_bytes=500")) > 2
    assert read(path, "read.split_bytes=500") == read(path)
    assert [r.path for r in read(path)] == [f"{n}.py" for n in range(100)]


# ---- damage ----


@pytest.mark.parametrize("compression", ["none", "zstd", "snappy"])
@pytest.mark.parametrize("checksum", [True, False])
def test_a_damaged_row_group_is_named_and_the_others_are_read(compression: str, checksum: bool, tmp_path: Path) -> None:
    rows = [{"text": hashlib.sha256(str(n).encode()).hexdigest() * 20, "path": f"{n}.py"} for n in range(40)]
    options = dict(row_group_size=10, compression=compression, use_dictionary=False, write_page_checksum=checksum)
    path = parquet(tmp_path / "d.parquet", rows, **options)
    column = pq.ParquetFile(path).metadata.row_group(2).column(0)
    data = bytearray(path.read_bytes())
    for at in range(column.data_page_offset + 60, column.data_page_offset + column.total_compressed_size, 7):
        data[at] ^= 0xA5
    path.write_bytes(data)
    found = fates(read(path))
    kept = {p for p, (status, _) in found.items() if status == "kept"}
    assert {f"{n}.py" for n in range(40) if n // 10 != 2} <= kept
    if checksum:
        assert kept == {f"{n}.py" for n in range(40) if n // 10 != 2}
        status, reason = found["d.parquet:row-group-2"]
        assert status == "failed"
        assert "row group 2: 10 of its 10 rows cannot be read" in str(reason)
    else:  # without checksums damage may go unseen as long as it decodes, but no row is lost in silence
        assert len(kept) == 40 or len([1 for s, _ in found.values() if s != "kept"]) >= 1


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_a_truncated_parquet_file_is_failed(keep: float, tmp_path: Path) -> None:
    path = parquet(tmp_path / "d.parquet", [{"text": CODE, "path": "a.py"}])
    os.truncate(path, int(path.stat().st_size * keep))
    ((name, (status, reason)),) = fates(read(path)).items()
    assert (name, status) == ("d.parquet", "failed")
    assert "damaged or truncated" in str(reason)


DAMAGE_MANY = """
import random, sys
from pathlib import Path
from tests.corpus.sources.reading import read

path = Path(sys.argv[1])
whole, draw, silent = path.read_bytes(), random.Random(0), 0
for _ in range(400):
    data = bytearray(whole)
    for _ in range(draw.randint(1, 3)):
        data[draw.randrange(len(data))] = draw.randrange(256)
    path.write_bytes(data)
    records = read(path)
    silent += len(records) < 30 and not any(record.status == "failed" for record in records)
print("silent:", silent)
"""


def test_any_damage_ends_in_all_records_or_a_failure(tmp_path: Path) -> None:
    """In a process of its own: damaged statistics of a column have made pyarrow end it (see parquet.py)."""
    rows = [{"text": hashlib.sha256(str(n).encode()).hexdigest() * 5, "path": f"{n}.py", "stars": n} for n in range(30)]
    path = parquet(tmp_path / "d.parquet", rows, row_group_size=10)
    command = [sys.executable, "-c", DAMAGE_MANY, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3])
    assert (done.returncode, done.stdout) == (0, "silent: 0\n"), done.stderr


def test_a_parquet_bomb_is_not_unpacked(tmp_path: Path) -> None:
    table = pa.table({"text": pa.array([bytes(80_000_000).decode()], pa.large_string()), "path": ["a.py"]})
    path = tmp_path / "d.parquet"
    pq.write_table(table, path, compression="zstd", use_dictionary=False, write_statistics=False)
    assert path.stat().st_size < 400_000
    ((_, (status, reason)),) = fates(read(path)).items()
    assert status == "failed"
    assert "read.archive.max_ratio" in str(reason)


@pytest.mark.parametrize("name", ["d.jsonl.gz", "d.jsonl.zst"])
def test_several_frames_are_one_file_and_a_cut_one_is_told(name: str, tmp_path: Path) -> None:
    pack = gzip.compress if name.endswith("gz") else zstandard.compress
    frames = [pack(json.dumps({"text": CODE * n, "path": f"{n}.py"}).encode() + b"\n") for n in (1, 2, 3)]
    (tmp_path / name).write_bytes(b"".join(frames))
    assert list(fates(read(tmp_path / name))) == ["1.py", "2.py", "3.py"]
    (tmp_path / name).write_bytes(b"".join(frames)[:-5])
    found = fates(read(tmp_path / name))
    assert "damaged or truncated" in str(found.pop(name)[1])
    assert {"1.py", "2.py"} <= set(found)


def test_stars_below_the_least_are_dropped_and_so_are_unknown_ones(tmp_path: Path) -> None:
    rows = [{"text": CODE * (n + 1), "path": f"{n}.py", "stars": stars} for n, stars in enumerate([5, 4, None, 9])]
    found = by_path(read(jsonl(tmp_path / "d.jsonl", rows), "read.min_stars=5"))
    assert [r.status for r in found.values()] == ["kept", "dropped", "dropped", "kept"]
    assert (found["1.py"].reason, found["1.py"].value, found["1.py"].threshold) == ("stars", 4, "< 5")
    assert (found["2.py"].reason, found["2.py"].value) == ("stars", None)
    assert "not known" in str(found["2.py"].threshold)
    assert config().read.min_stars is None
