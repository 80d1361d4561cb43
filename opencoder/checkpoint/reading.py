"""Reading the tensor files of a checkpoint: what is wanted goes from the file to its place, without a copy between.

torch's own reader unpickles each saved part into a tensor of its own and copies from that."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from itertools import groupby
from typing import IO, Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

STORAGE = "data/0"
"""Record of a file of torch.save that holds the bytes of its only tensor."""


class TensorReader(FileSystemReader):
    """Fills tensors on the CPU straight from the file where their bytes lie there in one run; all others as torch does."""

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the items of `plan`, each file front to back."""
        left = []
        items = sorted(plan.items, key=self._place_of)
        for name, of_file in groupby(items, key=lambda item: str(self._place_of(item)[0])):
            with open(os.path.join(self.path, name), "rb", buffering=0) as file:
                for item in of_file:
                    if not self._read_directly(file, item, planner):
                        left.append(item)
        if left:
            return super().read_data(LoadPlan(left, plan.storage_data, plan.planner_data), planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _place_of(self, item: ReadItem) -> tuple[str, int]:
        place = self.storage_data[item.storage_index]
        return place.relative_path, place.offset

    def _read_directly(self, file: IO[bytes], item: ReadItem, planner: LoadPlanner) -> bool:
        """False: this item is none of those, and nothing was read into its tensor."""
        place = self.storage_data[item.storage_index]
        if item.type == LoadItemType.BYTE_IO or place.transform_descriptors:
            return False
        target = planner.resolve_tensor(item).detach()
        if target.device.type != "cpu" or not target.is_contiguous() or target.numel() == 0:
            return False
        saved: torch.Tensor = torch.load(self._slice_file(file, place), map_location="meta", weights_only=True)
        whole = saved.is_contiguous() and saved.storage_offset() == 0 and saved.dtype == target.dtype
        first = _offset_of_run(saved.shape, item.storage_offsets, item.lengths)
        if not whole or first is None or target.shape != torch.Size(item.lengths):
            return False
        container: Any = torch._C.PyTorchFileReader(self._slice_file(file, place))
        if container.get_record("byteorder").decode() != sys.byteorder:
            return False
        begin = place.offset + container.get_record_offset(STORAGE) + first * saved.element_size()
        _read_into(file, begin, target)
        planner.commit_tensor(item, target)
        return True


def _offset_of_run(shape: Sequence[int], offsets: Sequence[int], lengths: Sequence[int]) -> int | None:
    """Elements before the box (offsets, lengths) of a contiguous tensor, if the box is one run of it; else None."""
    cut = next((i for i, n in enumerate(lengths) if n != 1), len(shape))
    if any(n != size for n, size in zip(lengths[cut + 1 :], shape[cut + 1 :], strict=True)):
        return None
    return sum(offset * math.prod(shape[i + 1 :]) for i, offset in enumerate(offsets))


def _read_into(file: IO[bytes], begin: int, target: torch.Tensor) -> None:
    """Fill `target` with the bytes from `begin` on. Raises OSError if the file ends before."""
    view = target.reshape(-1).view(torch.uint8).numpy().data
    done = 0
    while done < len(view):
        n = os.preadv(file.fileno(), [view[done:]], begin + done)
        if n == 0:
            raise OSError(f"{file.name} ends {len(view) - done} bytes too early")
        done += n
