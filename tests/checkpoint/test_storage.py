"""Files of tensors that the disk writes while further bytes come."""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from opencoder.checkpoint import storage
from opencoder.checkpoint.storage import SummedFile, TensorWriter

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def save(folder: Path) -> TensorWriter:
    writer = TensorWriter(folder)
    dcp.save({f"t{i}": torch.randn(100, 100) for i in range(20)}, storage_writer=writer, no_dist=True)
    return writer


class AtOnce:
    """An executor that does everything when it is asked to."""

    def submit(self, function: Callable[..., None], *args: Any) -> Future[None]:
        done: Future[None] = Future()
        done.set_result(function(*args))
        return done


def test_the_disk_begins_whenever_as_much_has_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    monkeypatch.setattr(storage, "FLUSH_BYTES", 100)
    monkeypatch.setattr(os, "fdatasync", lambda number: begun.append(os.fstat(number).st_size))
    with open(tmp_path / "file", "wb", buffering=0) as raw:
        file = SummedFile(raw, AtOnce())  # type: ignore[arg-type]
        for _ in range(10):
            file.write(b"x" * 40)
        file.sync()
    assert begun == [120, 240, 360]


def test_size_and_checksum_are_those_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FLUSH_BYTES", 100_000)
    writer = save(tmp_path)
    ((name, facts),) = writer.written.items()
    data = (tmp_path / name).read_bytes()
    assert facts == (len(data), f"{zlib.crc32(data):08x}")


def test_what_the_disk_says_early_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(storage, "FLUSH_BYTES", 700_000)  # of 800,000: fsync, at the end, is the next to ask
    monkeypatch.setattr(os, "fdatasync", full)
    with pytest.raises(BaseException, match="no space"):
        save(tmp_path)


def test_an_error_that_torch_would_hide_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(storage, "FLUSH_BYTES", 10)
    monkeypatch.setattr(os, "fdatasync", full)
    with ThreadPoolExecutor(1) as pool, open(tmp_path / "file", "wb", buffering=0) as raw:
        file = SummedFile(raw, pool)
        file.write(b"x" * 20)
        file.abandon()  # waits for the thread
        with pytest.raises(OSError, match="no space"):
            file.write(b"x" * 20)
        assert file.error is not None
