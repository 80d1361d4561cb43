"""The tensor files of a checkpoint: torch.distributed.checkpoint's format, written one tensor at a time, with a checksum.

torch's own writer keeps a copy of every part that is a view until its file is closed, which for slices of a flat buffer
is the whole state once more; this one holds one part at a time, so parts may also be read only when their turn comes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future as TorchFuture
from torch.utils.serialization import config as serialization_config

from opencoder.files import FileFacts, crc32

FILE_BYTES = 4 << 30
"""A rank starts another file beyond this size, so that verifying and copying can be shared out."""
FLUSH_BYTES = 128 << 20
"""Bytes after which a thread has the disk write what is in the page cache, which else begins with fsync, at the end."""


class SummedFile:
    """A binary file that is written front to back and knows its CRC-32. The disk works while further bytes come."""

    def __init__(self, file: IO[bytes], flushing: ThreadPoolExecutor) -> None:
        self.file, self.flushing = file, flushing
        self.bytes = self.crc32 = 0
        self.error: OSError | None = None
        """What went wrong in `write`: torch.save hides it behind an error of its own."""
        self._flush: Future[None] | None = None
        self._flushed = 0

    def write(self, data: Any) -> int:
        """Append `data` (bytes-like)."""
        view = memoryview(data).cast("B")
        self.crc32 = crc32(view, self.crc32)
        try:
            self._write_all(view)
            self._begin_flush()
        except OSError as error:
            self.error = error
            raise
        return len(view)

    def _write_all(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            done += self.file.write(view[done:])
        self.bytes += done

    def _begin_flush(self) -> None:
        if self.bytes - self._flushed >= FLUSH_BYTES and (self._flush is None or self._flush.done()):
            self._wait()
            self._flushed = self.bytes
            self._flush = self.flushing.submit(os.fdatasync, self.file.fileno())

    def sync(self) -> None:
        """Until everything is on the disk."""
        self._wait()
        os.fsync(self.file.fileno())

    def _wait(self) -> None:
        if self._flush is not None:
            self._flush.result()  # raises OSError: the system tells of a failed write once

    def abandon(self) -> None:
        """Before the file is closed early: no thread may use its number afterwards."""
        if self._flush is not None:
            wait([self._flush])

    def flush(self) -> None:
        """Hand everything to the system."""
        self.file.flush()

    def tell(self) -> int:
        """Bytes so far."""
        return self.bytes


class TensorWriter(FileSystemWriter):
    """Writes this rank's parts to `folder`; afterwards `written` says what each of its files holds."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, overwrite=False)
        self.folder = folder
        self.written: dict[str, FileFacts] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        """Write the items of `plan`, in files of about FILE_BYTES."""
        results: list[WriteResult] = []
        # torch's own CRC inside each tensor is not checked by its reader, and takes longer than the disk.
        without_crc = serialization_config.patch("save.compute_crc32", False)  # type: ignore[attr-defined]
        with ThreadPoolExecutor(1, "flush") as flushing, without_crc:
            for number, items in enumerate(_split(plan.items)):
                name = f"{plan.storage_data.prefix}{number}.distcp"
                results += self._write_file(name, items, planner, flushing)
        future: TorchFuture[list[WriteResult]] = TorchFuture()
        future.set_result(results)
        return future

    def _write_file(
        self, name: str, items: list[WriteItem], planner: SavePlanner, flushing: ThreadPoolExecutor
    ) -> list[WriteResult]:
        results = []
        with open(self.folder / name, "wb", buffering=0) as raw:
            file = SummedFile(raw, flushing)
            try:
                for item in items:
                    offset = file.tell()
                    data = planner.resolve_data(item)
                    if isinstance(data, torch.Tensor):
                        _save_tensor(data, file)
                    else:
                        file.write(data.getbuffer())
                    length = file.tell() - offset
                    results.append(WriteResult(item.index, length, _StorageInfo(name, offset, length)))
                file.sync()
            finally:
                file.abandon()
        self.written[name] = FileFacts(file.bytes, f"{file.crc32:08x}")
        return results


def _save_tensor(part: torch.Tensor, file: SummedFile) -> None:
    try:
        torch.save(_own_storage(part), file)  # type: ignore[arg-type]
    except RuntimeError:
        if file.error is not None:
            raise file.error from None
        raise


def _own_storage(part: torch.Tensor) -> torch.Tensor:
    """`part` on the CPU; torch.save writes the whole storage of a view, so a view is copied first."""
    part = part.detach().cpu()
    whole = part.is_contiguous() and part.untyped_storage().nbytes() == part.numel() * part.element_size()
    return part if whole else part.clone(memory_format=torch.contiguous_format)


def _split(items: list[WriteItem]) -> Iterator[list[WriteItem]]:
    """Runs of `items` of about FILE_BYTES; at least one, perhaps empty: a rank that owns nothing still has a file."""
    run: list[WriteItem] = []
    size = 0
    for item in items:
        n = 0
        if item.type != WriteItemType.BYTE_IO and item.tensor_data is not None:
            n = item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize
        if run and size + n > FILE_BYTES:
            yield run
            run, size = [], 0
        run.append(item)
        size += n
    yield run
