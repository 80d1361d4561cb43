"""What torch.distributed.checkpoint is handed: every tensor under its global shape, held here in parts.

A part is one or more boxes of the global tensor: a shard of a matrix is one, an interval of a flattened shard (the sharded
optimizer's) up to three. Boxes that several ranks hold are written by one of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from opencoder.parallel.mesh import Mesh
from opencoder.parallel.placement import Placement

Interval = tuple[int, int]
"""[begin, end) of the flattened local tensor."""
Part = tuple[torch.Tensor, Placement] | tuple[torch.Tensor, Placement, Interval]
"""This rank's part and where it lives in the global tensor; with an interval, the part is flat and holds just that piece
of what the placement gives this rank."""
Tensors = Mapping[str, Part]
"""Checkpoint key → part."""


class GlobalPart(torch.Tensor):
    """Looks like the whole tensor (`size()`, dtype) and holds `boxes`: offsets in it → contents, which are shared, so
    that loading fills them in place. No arithmetic: it has no storage of its own."""

    boxes: dict[tuple[int, ...], torch.Tensor]

    @staticmethod
    def __new__(
        cls, global_shape: tuple[int, ...], boxes: dict[tuple[int, ...], torch.Tensor], dtype: torch.dtype
    ) -> GlobalPart:
        """`boxes` all have `dtype`."""
        part: GlobalPart = torch.Tensor._make_wrapper_subclass(cls, global_shape, dtype=dtype)
        part.boxes = boxes
        return part

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any, **__: Any) -> Any:  # type: ignore[override]
        raise TypeError(f"{func} of a checkpoint part, which only stands for a tensor")

    # ---- what torch.distributed.checkpoint asks for ----

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(at), box.shape) for at, box in self.boxes.items()]

    def __create_write_items__(self, key: str, _: object) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(key, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset is not None, index
        return self.boxes[tuple(index.offset)]


def global_part(part: Part, mesh: Mesh) -> GlobalPart:
    """`part` as the checkpoint sees it, sharing its storage. Raises ValueError if its size is not what its placement
    says."""
    local, placement = part[0].detach(), part[1]
    rectangles = placement.rectangles(mesh, part[2] if len(part) == 3 else None)
    if local.numel() != sum(math.prod(r.sizes) for r in rectangles):
        raise ValueError(f"part of shape {tuple(local.shape)} does not fit {placement}")
    if len(part) == 2:  # one box, whatever its strides
        return GlobalPart(placement.global_shape, {r.offsets: local.view(r.sizes) for r in rectangles}, local.dtype)
    boxes = {}
    for r in rectangles:
        begin = r.begin - part[2][0]
        boxes[r.offsets] = local[begin : begin + math.prod(r.sizes)].view(r.sizes)
    return GlobalPart(placement.global_shape, boxes, local.dtype)
