"""Tensors read straight from checkpoint files: equal to torch's own reader, and which ones are."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from opencoder.checkpoint.reading import TensorReader, _offset_of_run
from opencoder.checkpoint.storage import TensorWriter

SHAPE = (6, 5, 4)
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Target:
    """A planner with one place for everything."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.committed = tensor, 0

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        return self.tensor

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        self.committed += 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    whole = {
        "fp32": torch.randn(SHAPE),
        "bf16": torch.randn(SHAPE).bfloat16(),
        "bool": torch.randn(SHAPE) > 0,
    }
    dcp.save(dict(whole), storage_writer=TensorWriter(tmp_path), no_dist=True)
    return tmp_path


def read(reader: FileSystemReader, name: str, offsets: Any, lengths: Any, target: torch.Tensor) -> int:
    """Fill `target`; how many items were left to torch."""
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    index = MetadataIndex(name, torch.Size([0] * len(SHAPE)), 0)
    item = ReadItem(
        LoadItemType.TENSOR, index, torch.Size([0] * len(SHAPE)), index, torch.Size(offsets), torch.Size(lengths)
    )
    planner, left = Target(target), []
    theirs = FileSystemReader.read_data

    def counted(self: Any, plan: LoadPlan, planner: Any) -> Any:
        left.extend(plan.items)
        return theirs(self, plan, planner)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileSystemReader, "read_data", counted)
        reader.read_data(LoadPlan([item]), planner)  # type: ignore[arg-type]
    assert planner.committed == 1
    return len(left)


BOXES = [
    ((0, 0, 0), (6, 5, 4), True),
    ((2, 0, 0), (3, 5, 4), True),
    ((2, 1, 0), (1, 3, 4), True),
    ((5, 4, 1), (1, 1, 2), True),
    ((2, 1, 0), (2, 3, 4), False),
    ((0, 0, 1), (6, 5, 2), False),
    ((0, 2, 0), (6, 1, 4), False),
]


@pytest.mark.parametrize(("offsets", "lengths", "direct"), BOXES)
@pytest.mark.parametrize("name", ["fp32", "bf16", "bool"])
def test_boxes_equal_those_of_torchs_reader(
    folder: Path, name: str, offsets: tuple[int, ...], lengths: tuple[int, ...], direct: bool
) -> None:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "bool": torch.bool}[name]
    ours, theirs = torch.zeros(lengths, dtype=dtype), torch.ones(lengths, dtype=dtype)
    left = read(TensorReader(folder), name, offsets, lengths, ours)
    read(FileSystemReader(folder), name, offsets, lengths, theirs)
    assert left == (0 if direct else 1)
    assert torch.equal(ours, theirs)


def test_other_types_and_strides_are_left_to_torch(folder: Path) -> None:
    whole = ((0, 0, 0), SHAPE)
    for name, target in {
        "fp32": torch.zeros(SHAPE, dtype=torch.float64),
        "bf16": torch.zeros((*SHAPE, 2), dtype=torch.bfloat16)[..., 0],
    }.items():
        expected = torch.zeros(SHAPE, dtype=target.dtype)
        assert read(TensorReader(folder), name, *whole, target) == 1
        read(FileSystemReader(folder), name, *whole, expected)
        assert torch.equal(target, expected)


def test_tensors_that_torchs_writer_saved_with_strides_are_left_to_torch(tmp_path: Path) -> None:
    saved = torch.randn(SHAPE[::-1]).permute(2, 1, 0)
    dcp.save({"transposed": saved}, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    target = torch.zeros(SHAPE)
    assert read(TensorReader(tmp_path), "transposed", (0, 0, 0), SHAPE, target) == 1
    assert torch.equal(target, saved)


def test_a_file_cut_short_is_an_error(folder: Path) -> None:
    reader = TensorReader(folder)
    place = _place(reader, "fp32")
    with open(folder / place.relative_path, "r+b") as file:
        file.truncate(place.offset + place.length // 2)
    with pytest.raises((OSError, RuntimeError)):
        read(reader, "fp32", (0, 0, 0), SHAPE, torch.zeros(SHAPE))


def _place(reader: FileSystemReader, name: str) -> Any:
    metadata = reader.read_metadata()
    return next(place for index, place in (metadata.storage_data or {}).items() if index.fqn == name)


def test_the_offset_of_a_run_is_that_of_its_first_element() -> None:
    numbers = torch.arange(math.prod(SHAPE)).reshape(SHAPE)
    for offsets, lengths, direct in BOXES:
        box = numbers
        for dim, (start, n) in enumerate(zip(offsets, lengths, strict=True)):
            box = box.narrow(dim, start, n)
        run = torch.equal(box.reshape(-1), box.reshape(-1)[0] + torch.arange(box.numel()))
        assert run == direct
        assert _offset_of_run(SHAPE, offsets, lengths) == (int(box.reshape(-1)[0]) if run else None)
    assert _offset_of_run((), (), ()) == 0
