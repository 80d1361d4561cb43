"""`build-corpus` end to end: outputs, reasons, bad input, kills, and independence of workers and order."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from opencoder.config import load_corpus_config
from opencoder.corpus.build import build_corpus
from opencoder.corpus.explain import explain
from opencoder.errors import DataError, UserError

COMMAND = [sys.executable, "-m", "opencoder.tools.cli", "build-corpus"]


def good(seed: int) -> str:
    """A file that no rule drops."""
    draw = random.Random(seed)
    words = [
        f"{draw.choice('abcdefgh')}{draw.choice(['name', 'value', 'count', 'index', 'total'])}{chr(97 + i % 26)}{chr(97 + i // 26)}"
        for i in range(60)
    ]
    return "".join(
        f"def {a}_{b}({c}):\n    {b} = compute({c}, {a})\n    if {b} > {c}:\n        {a}.append({b} - {c})\n"
        f"    while {c} < {b}:\n        {c} += step({a}, {b})\n        {a}.extend({c} * {b})\n    return {a}\n\n\n"
        for a, b, c in zip(words[::3], words[1::3], words[2::3], strict=True)
    )


def build(inputs: list[Path], output: Path, *overrides: str, workers: int = 1, **options: Any) -> dict[str, Any]:
    return build_corpus(
        [str(p) for p in inputs], output, load_corpus_config(None, list(overrides)), workers=workers, **options
    )


def rows(output: Path, stage: str) -> list[dict[str, Any]]:
    return [row for part in sorted((output / stage).glob("*.parquet")) for row in pq.read_table(part).to_pylist()]


def by_path(output: Path, stage: str = "dropped") -> dict[str, dict[str, Any]]:
    return {row["path"]: row for row in rows(output, stage)}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one file for each fate."""
    root = tmp_path_factory.mktemp("in") / "src"
    (root / "pkg").mkdir(parents=True)
    for i in range(6):
        (root / "pkg" / f"good{i}.py").write_text(good(i))
    (root / "pkg" / "copy.py").write_text(good(0))
    (root / "pkg" / "near.py").write_text(good(1) + "# other\n")
    (root / "pkg" / "near_too.py").write_text(good(1) + "# changed\n")
    (root / "big.py").write_text("x" * 60_000)
    (root / "empty.py").write_text("")
    (root / "nul.py").write_bytes(b"x = 1\n\0\n")
    (root / "latin.py").write_bytes("é".encode("latin-1"))
    (root / "what.zzz").write_text(good(9))
    (root / "table.csv").write_text("a,b\n")
    (root / "short.py").write_text("x = 1\n")
    (root / "loop").symlink_to(root, target_is_directory=True)
    (root / "broken.py").symlink_to(root / "absent.py")
    (root / "a.py").symlink_to(root / "b.py")
    (root / "b.py").symlink_to(root / "a.py")
    os.mkfifo(root / "pipe.py")
    (root / "memory.py").symlink_to("/proc/self/mem")
    return root


OPTIONS = ("max_bytes=50000", "dedup.preset=bigcode")


@pytest.fixture(scope="module")
def corpus(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("out") / "corpus"
    build([source], output, *OPTIONS)
    return output


def test_every_file_has_one_fate_and_the_counts_add_up(source: Path, corpus: Path) -> None:
    report = json.loads((corpus / "report.json").read_text())
    listed = sorted(row["path"] for stage in ("clean", "dropped", "failed") for row in rows(corpus, stage))
    present = sorted(str(Path(f, n).relative_to(source)) for f, _, names in os.walk(source) for n in names)
    assert listed == present
    counts = report["counts"]
    assert counts == {
        "in": len(present),
        "kept": 6,
        "dropped": len(present) - 6 - counts["failed"],
        "failed": counts["failed"],
    }


def test_reasons_values_and_thresholds(corpus: Path) -> None:
    dropped = by_path(corpus)
    found = {path: (row["stage"], row["reason"]) for path, row in dropped.items()}
    assert found == {
        "big.py": ("read", "size"),
        "empty.py": ("read", "empty"),
        "nul.py": ("read", "binary"),
        "latin.py": ("read", "encoding"),
        "what.zzz": ("language", "unknown_language"),
        "table.csv": ("language", "excluded_type"),
        "pkg/good0.py": ("exact_dedup", "exact_duplicate"),
        "pkg/near.py": ("fuzzy_dedup", "near_duplicate"),
        "pkg/near_too.py": ("fuzzy_dedup", "near_duplicate"),
        "short.py": ("rules", "qsc_code_num_words"),
    }
    assert dropped["big.py"]["value"] == 60_000
    assert dropped["big.py"]["threshold"] == "> 50000"
    assert dropped["nul.py"]["value"] == 6
    assert (dropped["short.py"]["value"], dropped["short.py"]["threshold"]) == (2, "< 30")
    assert {h["rule"] for h in json.loads(dropped["short.py"]["hits"])} >= {"qsc_code_num_words", "qsc_code_num_lines"}
    assert all(row["stage"] and row["reason"] and row["threshold"] for row in dropped.values())


def test_duplicates_follow_the_keep_rule_and_are_listed(corpus: Path) -> None:
    clusters = {row["path"]: row for row in pq.read_table(corpus / "clusters.parquet").to_pylist()}
    assert clusters["pkg/good0.py"]["kept_path"] == "pkg/copy.py"  # equal stars and times: the smaller path
    assert clusters["pkg/good0.py"]["jaccard"] == 1.0
    fuzzy = [row for row in clusters.values() if row["kind"] == "fuzzy"]
    assert [(row["path"], row["kept_path"]) for row in fuzzy] == [
        ("pkg/near.py", "pkg/good1.py"),
        ("pkg/near_too.py", "pkg/good1.py"),
    ]
    assert 0.9 < fuzzy[1]["jaccard"] < 1.0


def test_what_cannot_be_read_is_failed_by_name(corpus: Path) -> None:
    failed = by_path(corpus, "failed")
    assert set(failed) == {"broken.py", "a.py", "b.py", "pipe.py", "memory.py"}
    assert "No such file" in failed["broken.py"]["reason"]
    assert "symbolic links" in failed["a.py"]["reason"]
    assert failed["pipe.py"]["reason"] == "not a regular file"


def test_clean_documents_carry_their_columns(source: Path, corpus: Path) -> None:
    clean = by_path(corpus, "clean")
    row = clean["pkg/good2.py"]
    data = (source / "pkg" / "good2.py").read_bytes()
    assert row["id"] == hashlib.sha256(data).hexdigest()
    assert row["text"].encode() == data
    assert (row["language"], row["doc_type"], row["size_bytes"], row["source"]) == ("python", "code", len(data), "src")
    assert {"id", "path", "repo", "language", "doc_type", "text", "size_bytes", "licence"} <= set(row)


def snapshot(output: Path) -> dict[str, bytes]:
    """Everything but times."""
    found = {}
    for path in sorted(output.rglob("*")):
        if path.is_file() and path.name != "timings.html":
            content = path.read_bytes()
            if path.suffix == ".json":
                tree = json.loads(content)
                tree.pop("timings")
                content = json.dumps(tree).encode()
            found[str(path.relative_to(output))] = content
    return found


def test_result_is_independent_of_workers_and_of_input_order(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for i in range(4):
        (other / f"m{i}.py").write_text(good(20 + i))
    small = (*OPTIONS, "shard_bytes=3000")
    build([source, other], tmp_path / "a", *small, workers=1)
    build([other, source], tmp_path / "b", *small, workers=2)
    a, b = snapshot(tmp_path / "a"), snapshot(tmp_path / "b")
    assert len([name for name in a if name.startswith("clean")]) > 1
    assert a == b


def test_a_finished_corpus_is_kept_and_other_parameters_are_refused(source: Path, corpus: Path) -> None:
    before = (corpus / "manifest.json").stat().st_mtime_ns
    build([source], corpus, *OPTIONS)
    assert (corpus / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"dedup\.preset is bigcode there and datatrove here"):
        build([source], corpus, "max_bytes=50000", "dedup.preset=datatrove")


def test_a_folder_of_something_else_is_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds no corpus"):
        build([source], tmp_path)


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A folder with files for twenty shards, and their corpus built in one go."""
    root = tmp_path_factory.mktemp("uncut") / "src"
    root.mkdir()
    for i in range(20):
        (root / f"f{i:02d}.py").write_text(good(i) * 3)
    build([root], root.parent / "corpus", "shard_bytes=15000")
    return root, snapshot(root.parent / "corpus")


@pytest.mark.parametrize(
    "after",
    ["read/000001.parquet", "fuzzy/first/000001.entries.npy", "judge/000001.parquet", "output/000001.clean.parquet"],
)
def test_killed_anywhere_and_started_again_gives_the_same_bytes(
    after: str, uncut: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    root, whole = uncut
    command = [*COMMAND, "--input", str(root), "--workers", "1", "--output", str(tmp_path / "cut"), "shard_bytes=15000"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and not (tmp_path / "cut" / "work" / after).exists():
        time.sleep(0.002)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    build([root], tmp_path / "cut", "shard_bytes=15000")
    assert snapshot(tmp_path / "cut") == whole


# ---- containers ----


def document(i: int, **more: Any) -> dict[str, Any]:
    return {"text": good(i), "path": f"d{i}.py", **more}


def container(path: Path, documents: list[dict[str, Any]]) -> Path:
    payload = "".join(json.dumps(d) + "\n" for d in documents).encode()
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(payload))
    elif path.suffix == ".zst":
        path.write_bytes(zstandard.compress(payload))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(documents), path, row_group_size=10)
    else:
        path.write_bytes(payload)
    return path


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.jsonl.zst", "d.parquet"])
def test_containers_are_read_and_truncated_ones_are_failed_by_name(name: str, tmp_path: Path) -> None:
    path = container(tmp_path / name, [document(i, stars=i, repo="r", license="mit") for i in range(30)])
    build([path], tmp_path / "whole")
    clean = by_path(tmp_path / "whole", "clean")
    assert len(clean) == 30
    assert (clean["d3.py"]["stars"], clean["d3.py"]["repo"], clean["d3.py"]["licence"]) == (3, "r", "mit")
    os.truncate(path, path.stat().st_size * 3 // 4)
    report = build([path], tmp_path / "cut")
    assert report["counts"]["failed"] == 1
    (failure,) = rows(tmp_path / "cut", "failed")
    assert failure["path"].startswith(name)
    assert report["counts"]["in"] == report["counts"]["kept"] + 1


def test_stars_decide_which_copy_is_kept(tmp_path: Path) -> None:
    copies = [document(1, stars=s, path=f"c{s}.py") for s in (3, 10, 7)]
    build([container(tmp_path / "d.jsonl", copies)], tmp_path / "out")
    assert [row["path"] for row in rows(tmp_path / "out", "clean")] == ["c10.py"]


def test_a_line_that_is_not_json_is_failed_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(document(1)) + "\nnot json\n" + json.dumps({"text": 3}) + "\n")
    build([path], tmp_path / "out")
    failed = by_path(tmp_path / "out", "failed")
    assert "line 2 is not JSON" in failed["d.jsonl:2"]["reason"]
    assert any("the text is int" in row["reason"] or "text" in row["reason"] for row in failed.values())
    assert len(rows(tmp_path / "out", "clean")) == 1


@pytest.mark.parametrize("name", ["d.jsonl", "d.parquet"])
def test_a_missing_column_is_named_with_those_that_are_there(name: str, tmp_path: Path) -> None:
    path = container(tmp_path / name, [{"body": "a", "path": "b.py"}])
    with pytest.raises(DataError, match="no column `text` or `content`; it has body, path"):
        build([path], tmp_path / "out")


def limited(command: list[str], size: int) -> subprocess.CompletedProcess[str]:
    """Run with `size` bytes of data, of which Python and its libraries take 400 to 500 million."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))

    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, env=env, check=False)


@pytest.mark.parametrize("size", [400_000_000, pytest.param(1_000_000_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["huge.py", "huge.jsonl"])
def test_a_line_larger_than_memory_is_dropped(name: str, size: int, tmp_path: Path) -> None:
    path = tmp_path / name
    with open(path, "wb") as file:
        file.write(b'{"text": "')
        file.truncate(size)  # sparse: a line of NUL bytes that takes no disk
        file.seek(0, os.SEEK_END)
        file.write(b'"}\n' + json.dumps(document(1)).encode() + b"\n")
    done = limited([*COMMAND, "--input", str(path), "--output", str(tmp_path / "out"), "--workers", "1"], 600_000_000)
    assert done.returncode == 0, done.stderr
    dropped = rows(tmp_path / "out", "dropped")
    assert [(row["stage"], row["reason"]) for row in dropped] == [("read", "size")]
    assert dropped[0]["value"] >= size
    assert len(rows(tmp_path / "out", "clean")) == (name == "huge.jsonl")


# ---- explain, command ----


def test_explain_answers_for_any_file(corpus: Path) -> None:
    assert "KEPT" in explain(corpus, "pkg/good3.py")
    assert "kept in place of pkg/good0.py (exact duplicate" in explain(corpus, "pkg/copy.py")
    text = explain(corpus, "pkg/near_too.py")
    assert "DROPPED at stage fuzzy_dedup" in text
    assert "kept: pkg/good1.py (fuzzy duplicate, Jaccard 0.9" in text
    text = explain(corpus, "short.py")
    assert "rule qsc_code_num_lines: value 1, dropped if < 10" in text
    assert "FAILED: not a regular file" in explain(corpus, "pipe.py")
    both = explain(corpus, by_path(corpus)["pkg/good0.py"]["id"])
    assert "KEPT" in both
    assert "exact_dedup" in both
    with pytest.raises(DataError, match=r"did you mean `short.py`"):
        explain(corpus, "shart.py")
    with pytest.raises(DataError, match="no finished corpus"):
        explain(corpus / "clean", "short.py")


def test_command_line_errors_are_one_line(tmp_path: Path) -> None:
    def run(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*COMMAND, *args], capture_output=True, text=True, check=False)

    done = run("--input", str(tmp_path / "absent"), "--output", str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr == f"error: --input {tmp_path / 'absent'} does not exist\n"
    done = run("--input", str(tmp_path), "--output", str(tmp_path / "out"), "dedup.presett=x")
    assert done.returncode == 2
    assert "did you mean `preset`" in done.stderr
    assert run("--output", "x").returncode == 2
