"""The index cache: built once, shared, never trusted when damaged, and no condition for training."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opencoder.data.cache import Arrays, IndexCache
from opencoder.data.gpt import GPTDataset
from opencoder.data.indexed import IndexedDataset, IndexedWriter
from opencoder.data.lm import BlendedDataset, build_lm_dataset

pytestmark = pytest.mark.fast
FORK = multiprocessing.get_context("fork")
WHAT: dict[str, Any] = {"kind": "test"}


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    with IndexedWriter(tmp_path / "d", np.int32) as writer:
        for j in range(60):
            writer.add_document([j] * (3 + j % 7))
    return str(tmp_path / "d")


def files(folder: Path) -> dict[str, tuple[int, int]]:
    return {p.name: (p.stat().st_mtime_ns, p.stat().st_ino) for p in folder.iterdir()}


def dataset(prefix: str, cache: IndexCache | None, **options: Any) -> GPTDataset:
    settings = {"seq_len": 8, "num_samples": 70, "seed": 1, **options}
    return GPTDataset(IndexedDataset(prefix), cache=cache, **settings)


def rows(data: GPTDataset | BlendedDataset) -> list[list[int]]:
    return [data[i].tokens.tolist() for i in range(len(data))]


def test_a_cached_index_is_the_built_one_and_is_not_written_again(prefix: str) -> None:
    truth = rows(dataset(prefix, None))
    assert rows(dataset(prefix, IndexCache())) == truth
    before = files(Path(f"{prefix}.cache"))
    assert sorted(name.split("-")[1] for name in before) == ["document.npy", "sample.npy", "shuffle.npy"]
    assert rows(dataset(prefix, IndexCache())) == truth
    assert files(Path(f"{prefix}.cache")) == before


@pytest.mark.parametrize("other", [{"seed": 2}, {"seq_len": 9}, {"num_samples": 71}, {"begin": 1}, {"end": 59}])
def test_another_description_is_another_index(prefix: str, tmp_path: Path, other: dict[str, int]) -> None:
    cache = IndexCache(tmp_path / "cache")
    dataset(prefix, cache)
    assert rows(dataset(prefix, cache, **other)) == rows(dataset(prefix, None, **other))
    assert len(list((tmp_path / "cache").iterdir())) == 6


def test_other_data_under_the_same_name_is_another_index(prefix: str) -> None:
    dataset(prefix, IndexCache())
    with IndexedWriter(prefix, np.int32) as writer:
        for j in range(60):
            writer.add_document([j] * (3 + (j + 1) % 7))
    assert rows(dataset(prefix, IndexCache())) == rows(dataset(prefix, None))


@pytest.mark.parametrize("name", ["document", "sample", "shuffle"])
def test_a_truncated_file_is_made_again(prefix: str, name: str, caplog: pytest.LogCaptureFixture) -> None:
    truth = rows(dataset(prefix, IndexCache()))
    (path,) = Path(f"{prefix}.cache").glob(f"*-{name}.npy")
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with caplog.at_level(logging.WARNING, "opencoder"):
        assert rows(dataset(prefix, IndexCache())) == truth
    assert "is truncated; it is made again" in caplog.text
    assert path.read_bytes() == whole


def test_a_folder_that_cannot_be_written_costs_one_line(
    prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    caches = [IndexCache(tmp_path / "file" / "cache", rank=r, ranks=2) for r in range(2)]
    for cache in caches:
        for seed in (1, 2):
            assert rows(dataset(prefix, cache, seed=seed)) == rows(dataset(prefix, None, seed=seed))
    assert [r.message.count("cannot be written") for r in caplog.records] == [1]


def test_a_full_disk_costs_one_line(
    prefix: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    assert rows(dataset(prefix, IndexCache())) == rows(dataset(prefix, None))
    assert len(caplog.records) == 1
    assert list(Path(f"{prefix}.cache").iterdir()) == []


def count_builds(folder: Path, seconds: float) -> int:
    """Builds `WHAT` in this process; each build leaves a file beside the cache."""

    def build() -> Arrays:
        (folder.parent / f"built-{os.getpid()}").touch()
        time.sleep(seconds)
        return {"a": np.arange(5)}

    found = IndexCache(folder).get(folder, WHAT, ("a",), build)
    return int(found["a"].sum())


def test_processes_at_once_build_once(tmp_path: Path) -> None:
    with FORK.Pool(4) as pool:
        sums = pool.starmap(count_builds, [(tmp_path / "cache", 0.5)] * 4, chunksize=1)
    assert sums == [10] * 4
    assert len(list(tmp_path.glob("built-*"))) == 1
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".npy"]


def test_a_killed_builder_is_not_waited_for(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    process = FORK.Process(target=count_builds, args=(folder, 60))
    process.start()
    while not list(tmp_path.glob("built-*")):
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    (marker,) = folder.iterdir()
    assert marker.suffix == ".building"
    (folder / f".{marker.stem}-a.other.1.tmp").write_bytes(b"half")
    start = time.monotonic()
    assert count_builds(folder, 0) == 10
    assert time.monotonic() - start < 5
    assert [p.suffix for p in folder.iterdir()] == [".npy"]


def test_a_builder_on_another_machine_is_waited_for_within_bounds(tmp_path: Path) -> None:
    cache = IndexCache(tmp_path, patience_s=0.3)
    cache.get(tmp_path, WHAT, ("a",), lambda: {"a": np.arange(5)})
    (path,) = tmp_path.iterdir()
    path.unlink()
    path.with_name(path.name.replace("-a.npy", ".building")).write_text("another-machine 1\n")
    start = time.monotonic()
    found = cache.get(tmp_path, WHAT, ("a",), lambda: {"a": np.arange(5)})
    assert found["a"].tolist() == [0, 1, 2, 3, 4]
    assert 0.3 <= time.monotonic() - start < 5


def test_a_blend_is_cached_too_and_ranks_begin_at_different_members(tmp_path: Path) -> None:
    prefixes = [str(tmp_path / name) for name in "abc"]
    for n, name in enumerate(prefixes):
        with IndexedWriter(name, np.int32) as writer:
            for j in range(30):
                writer.add_document([100 * n + j] * 9)
    blend = [(name, weight) for name, weight in zip(prefixes, (1.0, 2.0, 4.0), strict=True)]
    truth = rows(build_lm_dataset(blend, num_samples=60, seq_len=8, seed=1))
    for rank in range(3):
        cache = IndexCache(tmp_path / "cache", rank=rank, ranks=3)
        assert cache.order(3) == [(rank + i) % 3 for i in range(3)]
        assert rows(build_lm_dataset(blend, num_samples=60, seq_len=8, seed=1, cache=cache)) == truth
    assert len(list((tmp_path / "cache").iterdir())) == 3 * 3 + 2
