"""Very many files, very many lines: nothing is lost and memory does not grow with them."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from opencoder.config import load_corpus_config
from opencoder.corpus.build import build_corpus
from opencoder.corpus.read import find_items, read_item

from .reading import config, read
from .test_tar import member

LINE = "value = compute(first, second)\n"
LINKS = 30_000
"""Names of one file on disk; common file systems allow 65,000."""
SIZES = [
    5_000,
    pytest.param(1_000_000, marks=pytest.mark.slow),
]


def identical(root: Path, count: int, content: str) -> None:
    """`count` files of equal content, in folders of a thousand; hard links, so that they take names only."""
    for n in range(count):
        if n % 1000 == 0:
            folder = root / f"{n // 1000:04}"
            folder.mkdir(parents=True)
        if n % LINKS == 0:
            first = folder / f"{n}.py"
            first.write_text(content)
        else:
            os.link(first, folder / f"{n}.py")


@pytest.mark.parametrize("count", SIZES)
def test_identical_files_all_have_a_record(count: int, tmp_path: Path) -> None:
    identical(tmp_path / "in", count, LINE * 40)
    settings = config()
    ids = set()
    seen = 0
    for item in find_items([str(tmp_path / "in")], settings):
        (record,) = read_item(item, settings)
        assert record.status == "kept"
        ids.add(record.id)
        seen += 1
    assert seen == count
    assert len(ids) == 1


@pytest.mark.parametrize("count", [2_000, pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["identical", "one line each"])
def test_a_build_of_many_small_files_accounts_for_each(kind: str, count: int, tmp_path: Path) -> None:
    root = tmp_path / "in"
    if kind == "identical":
        identical(root, count, LINE * 40)
    else:
        root.mkdir()
        for n in range(count):
            (root / f"{n}.py").write_text(f"x = {n}\n")
    report = build_corpus([str(root)], tmp_path / "out", load_corpus_config(), workers=1)
    counts = report["counts"]
    assert counts["in"] == count
    assert counts["kept"] + counts["dropped"] == count
    reasons = report["by_reason"]
    if kind == "identical":
        assert reasons["exact_dedup: exact_duplicate"] == count - 1
    else:
        assert counts["kept"] == 0
        assert sum(n for name, n in reasons.items() if name.startswith("rules:")) >= count * 0.9


@pytest.mark.fast
def test_a_file_of_ten_million_lines(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"x\n" * 10_000_000)
    (record,) = read(tmp_path, "max_bytes=30000000")
    assert record.text is not None
    assert (record.status, record.text.count("\n")) == ("kept", 10_000_000)
    (record,) = read(tmp_path)
    assert (record.reason, record.value) == ("size", 20_000_000)


LIMITED = """
import sys
from opencoder.config import load_corpus_config
from opencoder.corpus.read import find_items, read_item
config = load_corpus_config()
print(sum(r.status == "kept" for i in find_items([sys.argv[1]], config) for r in read_item(i, config)))
"""


def kept_in_little_memory(path: Path) -> int:
    """Records kept, counted by a process that may have some 200 MB beyond what Python and its libraries take."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (450_000_000, 450_000_000))

    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LIMITED, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("count", [100_000, pytest.param(10_000_000, marks=pytest.mark.slow)])
def test_a_jsonl_file_of_many_lines_is_read_in_bounded_memory(count: int, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    with open(path, "w") as file:
        for start in range(0, count, 10_000):
            file.write("".join(f'{{"text": "x = {n}", "path": "{n}.py"}}\n' for n in range(start, start + 10_000)))
    assert kept_in_little_memory(path) == count


@pytest.mark.parametrize(("count", "size"), [(4_000, 120_000), pytest.param(1_000_000, 4_000, marks=pytest.mark.slow)])
def test_an_archive_larger_than_memory_is_read(count: int, size: int, tmp_path: Path) -> None:
    data = (LINE.encode() * (size // len(LINE) + 1))[:size]
    with open(tmp_path / "a.tar", "wb") as file:
        for n in range(count):
            head, _ = member(f"{n}.py", data)
            file.write(head.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-size % tarfile.BLOCKSIZE))
        file.write(bytes(2 * tarfile.BLOCKSIZE))
    assert kept_in_little_memory(tmp_path / "a.tar") == count
