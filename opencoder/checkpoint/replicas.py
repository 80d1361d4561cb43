"""Tensors that several ranks hold alike are compared before one of them is written for all.

Each rank hashes what others hold too, and the hashes are exchanged: 16 bytes a tensor. What differs would be lost silently:
a checkpoint keeps the values of one rank, and a resumed run would go on with another state than the one that was saved."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict

import numpy as np
import torch

from opencoder.errors import Failure
from opencoder.parallel.mesh import Mesh

from .parts import Part, Tensors

REMEDY = (
    "these ranks no longer train one model (a fault of a device, or of the network); nothing was written. Start again from "
    "the newest checkpoint, or save nevertheless with checkpoint.check_replicas=false, which keeps the values of one rank"
)


def check_replicas(tensors: Tensors, mesh: Mesh) -> None:
    """Compare, bit by bit, all parts that several ranks hold. Called by all ranks.

    Raises Failure on all of them alike, which names a tensor and the ranks on either side."""
    if mesh.world.size == 1:
        return
    shared = {_place(key, part, mesh): key for key, part in tensors.items() if _is_shared(part, mesh)}
    hashes = {place: _hash(tensors[key][0]) for place, key in shared.items()}
    mine = np.array(list(hashes.items()), np.uint64).reshape(-1, 2)
    found: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, rows in enumerate(mesh.world.gather_objects(mine)):
        for place, value in rows.tolist():
            found[place][value].append(rank)
    different = {place: list(ranks.values()) for place, ranks in found.items() if len(ranks) > 1}
    if not different:
        return
    told = {key: different[place] for place, key in shared.items() if place in different}
    names = {key: ranks for each in mesh.world.gather_objects(told) for key, ranks in each.items()}
    key = min(names)
    sides = " and ".join(("ranks " if len(r) > 1 else "rank ") + ", ".join(map(str, r)) for r in names[key])
    more = f", and {len(names) - 1} more" if len(names) > 1 else ""
    failure = Failure(f"{key} differs between {sides}, which must hold the same{more}: {REMEDY}")
    failure.told_elsewhere = mesh.world.rank != 0
    raise failure


def _is_shared(part: Part, mesh: Mesh) -> bool:
    copies = part[1].copies(mesh)
    if len(part) == 3:  # the data-parallel ranks have an interval each
        copies //= mesh.dp.size * mesh.cp.size
    return copies > 1 and part[0].numel() > 0


def _place(key: str, part: Part, mesh: Mesh) -> int:
    """A number for the boxes of the global tensor that the part is: ranks that hold the same have the same."""
    boxes = [(r.offsets, r.sizes) for r in part[1].rectangles(mesh, part[2] if len(part) == 3 else None)]
    return _number(hashlib.sha256(json.dumps([key, boxes]).encode()))


def _hash(tensor: torch.Tensor) -> int:
    raw = tensor.detach().reshape(-1).view(torch.uint8).cpu().numpy()
    return _number(hashlib.sha256(raw.data))


def _number(digest: hashlib._Hash) -> int:
    return int.from_bytes(digest.digest()[:8], "little")
