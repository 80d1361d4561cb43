"""Files of tensors that the disk writes while further bytes come."""

from __future__ import annotations

import errno
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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


def test_the_disk_begins_early_and_the_checksum_is_that_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    fdatasync = os.fdatasync

    def counted(number: int) -> None:
        begun.append(os.fstat(number).st_size)
        fdatasync(number)

    monkeypatch.setattr(storage, "FLUSH_BYTES", 100_000)
    monkeypatch.setattr(os, "fdatasync", counted)
    writer = save(tmp_path)
    ((name, facts),) = writer.written.items()
    data = (tmp_path / name).read_bytes()
    assert facts == (len(data), f"{zlib.crc32(data):08x}")
    assert len(begun) >= 1
    assert begun[0] < len(data) / 2


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
        file.abandon()
        with pytest.raises(OSError, match="no space"):
            file.write(b"x" * 20)
        assert file.error is not None
