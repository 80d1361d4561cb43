"""Folders, single files and URLs."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from opencoder.corpus.read import find_items, read_item, to_table
from opencoder.errors import DataError

from .reading import by_path, config, fates, items, read

pytestmark = pytest.mark.fast
CODE = "print('hello')\n"


def test_names_that_are_not_utf8_are_read_and_shown_with_their_bytes(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"a\xff.py")).write_text(CODE)
    (record,) = read(tmp_path)
    assert (record.path, record.status) == ("a\\xff.py", "kept")
    assert to_table([record])["path"].to_pylist() == ["a\\xff.py"]


def test_a_folder_that_cannot_be_listed_is_failed_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "shut").mkdir()
    (tmp_path / "open" / "a.py").write_text(CODE)
    real = os.scandir

    def scandir(path: str) -> object:  # as root reads everything, the refusal is played
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = fates(read(tmp_path))
    assert found == {
        "open/a.py": ("kept", None),
        "shut": ("failed", "the folder cannot be listed: Permission denied"),
    }


def test_folders_of_any_depth(tmp_path: Path) -> None:
    depth = sys.getrecursionlimit() + 100  # the whole path stays below the limit of the system
    name = "d/" * depth
    os.makedirs(tmp_path / "d")
    where = os.open(tmp_path, os.O_RDONLY)
    try:
        for n in range(depth):
            if n:
                os.mkdir("d", dir_fd=where)
            deeper = os.open("d", os.O_RDONLY, dir_fd=where)
            os.close(where)
            where = deeper
        with open(os.open("a.py", os.O_CREAT | os.O_WRONLY, dir_fd=where), "w") as file:
            file.write(CODE)
        assert fates(read(tmp_path)) == {f"{name}a.py": ("kept", None)}
    finally:
        os.close(where)
        # pytest clears its folders by recursion
        subprocess.run(["rm", "-rf", str(tmp_path / "d")], check=True)


def test_a_large_file_is_hashed_in_blocks(tmp_path: Path) -> None:
    with open(tmp_path / "a.py", "wb") as file:
        file.truncate(100_000_000)
    settings = config("max_bytes=100000")
    (item,) = find_items([str(tmp_path)], settings)
    tracemalloc.start()
    (record,) = read_item(item, settings)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()
    assert (record.reason, record.id) == ("size", hashlib.sha256(bytes(100_000_000)).hexdigest())


def test_files_without_a_size_are_read_to_their_end(tmp_path: Path) -> None:
    if not os.path.exists("/proc/version"):
        pytest.skip("needs /proc")
    (tmp_path / "a.py").symlink_to("/proc/version")
    (record,) = read(tmp_path)
    assert record.text == Path("/proc/version").read_text()


def test_repositories_by_depth_of_folders(tmp_path: Path) -> None:
    for name in ("own/one/a.py", "own/one/d/b.py", "own/c.py", "d.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(CODE)
    found = by_path(read(tmp_path, "read.repo_depth=2"))
    assert {p: r.repo for p, r in found.items()} == {
        "own/one/a.py": "own/one",
        "own/one/d/b.py": "own/one",
        "own/c.py": None,
        "d.py": None,
    }


def test_lfs_pointers_in_a_checkout(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    (tmp_path / "b.py").write_text("version https://git-lfs.github.com/spec/v1\n" + "x = 1\n" * 300)
    assert fates(read(tmp_path)) == {"a.py": ("dropped", "lfs_pointer"), "b.py": ("kept", None)}


# ---- URLs ----


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pipe({"/data/a.py": CODE.encode(), "/data/d/b.py": (CODE * 2).encode(), "/data/big.py": b"x" * 3_000_000})
    yield system
    system.store.clear()


def test_objects_behind_a_url_are_read(memory: fsspec.AbstractFileSystem) -> None:
    found = by_path(read("memory://data", "max_bytes=1000000"))
    assert {path: record.reason for path, record in found.items()} == {"a.py": None, "d/b.py": None, "big.py": "size"}
    assert found["big.py"].id == hashlib.sha256(b"x" * 3_000_000).hexdigest()
    assert {record.source for record in found.values()} == {"data"}


def test_containers_behind_a_url(memory: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    from .test_documents import jsonl, parquet
    from .test_tar import member, tar
    from .test_zip import pack

    rows = [{"text": CODE, "path": f"{n}.py"} for n in range(9)]
    memory.pipe("/in/t.tar", tar(member("p/a.py")))
    memory.pipe("/in/z.zip", pack(tmp_path / "z.zip", {"p/a.py": CODE}).read_bytes())
    memory.pipe("/in/j.jsonl", jsonl(tmp_path / "j.jsonl", rows).read_bytes())
    memory.pipe("/in/p.parquet", parquet(tmp_path / "p.parquet", rows, row_group_size=2).read_bytes())
    for name, paths in (("t.tar", ["p/a.py"]), ("z.zip", ["p/a.py"]), ("j.jsonl", [f"{n}.py" for n in range(9)])):
        assert list(fates(read(f"memory://in/{name}", "read.split_bytes=200"))) == paths
    assert list(fates(read("memory://in/p.parquet"))) == [f"{n}.py" for n in range(9)]
    inside = {record.path for record in read("memory://in", "read.containers=true")}
    assert {"t.tar/p/a.py", "z.zip/p/a.py", "3.py"} <= inside


def test_names_with_wildcards_are_names(memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe({"/w/a[1].py": CODE.encode(), "/w/b*.py": CODE.encode(), "/w/bc.py": CODE.encode()})
    assert set(fates(read("memory://w"))) == {"a[1].py", "b*.py", "bc.py"}
    assert {record.status for record in read("memory://w")} == {"kept"}


def test_a_replaced_object_is_seen_by_the_item(memory: fsspec.AbstractFileSystem) -> None:
    before = items("memory://data/a.py")
    assert items("memory://data/a.py") == before
    memory.pipe("/data/a.py", b"other bytes\n123")
    assert items("memory://data/a.py") != before


def test_file_urls_are_local_paths(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(CODE)
    assert fates(read(f"file://{tmp_path}")) == {"a.py": ("kept", None)}


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://absent", "does not exist or is empty"),
        ("nosuch://x/y", "nosuch"),
        ("zip://a.py::memory://data/z.zip", "chained URLs"),
        ("file://relative", "file:///absolute"),
    ],
)
def test_urls_that_cannot_be_listed_are_refused(url: str, message: str, memory: fsspec.AbstractFileSystem) -> None:
    with pytest.raises(DataError, match=message):
        items(url)


def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    known = sys.modules["fsspec.registry"].known_implementations
    monkeypatch.setitem(known, "stored", {"class": "absent_driver.X", "err": "Install absent_driver"})
    with pytest.raises(DataError, match="Install absent_driver"):
        items("stored://bucket/x")
