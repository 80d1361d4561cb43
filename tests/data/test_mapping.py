"""Mapped files: plain arrays, many of them, and damage that is told."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from opencoder.data.indexed import IndexedDataset, IndexedWriter
from opencoder.data.mapping import map_bytes, map_npy

pytestmark = pytest.mark.fast


def test_reads_are_plain_read_only_arrays(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "d", np.int32) as writer:
        writer.add_document([1, 2, 3])
    piece = IndexedDataset(tmp_path / "d").get(0, 1)
    assert type(piece) is np.ndarray  # slices of np.memmap cost ten times as much
    assert not piece.flags.writeable
    assert piece.tolist() == [2, 3]


def test_a_dataset_of_no_tokens_opens(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "d", np.int32) as writer:
        writer.add_document([])
    assert IndexedDataset(tmp_path / "d")[0].tolist() == []


def test_a_pickled_dataset_is_its_name(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "d", np.uint16) as writer:
        writer.add_document(np.arange(5000))
    text = pickle.dumps(IndexedDataset(tmp_path / "d"))
    assert len(text) < 500
    assert np.array_equal(pickle.loads(text)[0], np.arange(5000))


def test_npy_files(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.int64).reshape(6, 2)
    np.save(tmp_path / "a.npy", array)
    assert np.array_equal(map_npy(tmp_path / "a.npy"), array)
    whole = (tmp_path / "a.npy").read_bytes()
    for damaged in (whole[:-1], whole[:40], b"", b"x" * len(whole)):
        (tmp_path / "a.npy").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"npy|truncated|magic|EOF|header"):
            map_npy(tmp_path / "a.npy")


@pytest.mark.parametrize(("hard", "expected"), [(400, "300 mapped"), (100, "no more files can be opened than 100")])
def test_the_limit_of_open_files_is_raised_or_told(tmp_path: Path, hard: int, expected: str) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    script = f"""
import resource
from opencoder.data.mapping import map_bytes
from opencoder.errors import DataError
resource.setrlimit(resource.RLIMIT_NOFILE, (64, {hard}))
try:
    print(len([map_bytes({str(tmp_path / "f")!r}) for _ in range(300)]), "mapped")
except DataError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert expected in done.stdout


def test_a_mapping_outlives_the_name_of_its_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    array = map_bytes(tmp_path / "f")
    (tmp_path / "f").unlink()
    assert array.tobytes() == b"abc"
