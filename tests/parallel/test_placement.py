"""Placements: which part a rank holds, how often a value stands in the world, where a flat interval lies."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from opencoder.model.classes.partition import Partition
from opencoder.parallel.group import Group
from opencoder.parallel.mesh import Mesh, create_mesh
from opencoder.parallel.placement import Placement, replicated, sharded
from tests.harness import run_ranks


def at(axis: str, size: int, rank: int) -> Mesh:
    return Mesh(**{axis: Group(size, rank)})


@pytest.mark.fast
@pytest.mark.parametrize(
    ("shards", "rows"), [(None, [(0, 2), (2, 4), (4, 6), (6, 8)]), (2, [(0, 4), (0, 4), (4, 8), (4, 8)])]
)
def test_fewer_shards_than_ranks_are_shared_by_neighbours(shards: int | None, rows: list[tuple[int, int]]) -> None:
    placement = sharded((8, 3), 0, shards=shards)
    parts = [placement.slice_of(at("tp", 4, rank)) for rank in range(4)]
    assert parts == [(slice(*r), slice(0, 3)) for r in rows]


@pytest.mark.fast
@pytest.mark.parametrize("rows", [7, 1000, 1003])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("axis", ["tp", "dp_cp", "world"])
def test_uneven_parts_are_those_of_the_partition_of_classes(axis: str, ranks: int, rows: int) -> None:
    placement = Placement((rows, 3), 0, axis)
    if ranks > rows:
        pytest.skip("a rank without a class is refused elsewhere")
    partition = Partition(rows, ranks)
    for rank in range(ranks):
        start = partition.start(rank)
        assert placement.slice_of(at(axis, ranks, rank))[0] == slice(start, start + partition.size(rank))


def counted(rank: int, world: int, layout: dict[str, int]) -> dict[str, Any]:
    """Σ over the world of (this rank's elements / copies), for placements of a tensor of 48 elements."""
    mesh = create_mesh(**layout)
    cases = {
        "whole": replicated((16, 3)),
        "rows": sharded((16, 3), 0),
        "columns": sharded((3, 16), 1),
        "classes": Placement((16, 3), 0, "dp_cp", replicated_over=("tp",), grad_sum_axes=()),
        "classes of the world": Placement((16, 3), 0, "world", replicated_over=(), grad_sum_axes=()),
        "shared rows": sharded((16, 3), 0, shards=layout["tp"] // layout["kv_replicas"]),
    }
    found = {}
    for name, placement in cases.items():
        elements = torch.ones(placement.global_shape)[placement.slice_of(mesh)].numel()
        found[name] = float(mesh.world.all_reduce(torch.tensor(elements / placement.copies(mesh))))
    return found


@pytest.mark.parametrize(
    "layout", [{"tp": 4, "kv_replicas": 2}, {"tp": 2, "cp": 2, "kv_replicas": 2}, {"tp": 2, "kv_replicas": 1}]
)
def test_copies_count_every_value_once(layout: dict[str, int]) -> None:
    for found in run_ranks(counted, 8, layout):
        assert found == dict.fromkeys(found, 48.0)


@pytest.mark.fast
def test_a_tied_matrix_stands_at_both_ends_of_the_pipeline() -> None:
    tied = replace(sharded((16, 3), 0), replicated_over=("dp", "cp", "embed"))
    assert tied.copies(Mesh(dp=Group(3), embed=Group(2))) == 6


@pytest.mark.fast
@pytest.mark.parametrize("shape", [(11,), (4, 5), (3, 2, 4), (1, 7), (6, 1)])
@pytest.mark.parametrize("dim", [None, 0, 1])
def test_rectangles_of_every_interval_are_its_elements(shape: tuple[int, ...], dim: int | None) -> None:
    if dim is not None and dim >= len(shape):
        pytest.skip("no such dimension")
    whole = tuple(2 * n if i == dim else n for i, n in enumerate(shape))
    placement = Placement(whole) if dim is None else sharded(whole, dim)
    mesh = at("tp", 2, 1)
    truth = torch.arange(torch.Size(whole).numel()).view(whole)
    local = truth[placement.slice_of(mesh)].flatten()
    for begin in range(len(local) + 1):
        for end in range(begin, len(local) + 1):
            found = placement.rectangles(mesh, (begin, end))
            pieces = []
            for offsets, sizes, start in found:
                box = truth[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))].flatten()
                assert torch.equal(local[start : start + len(box)], box)
                pieces.append(box)
            assert torch.equal(torch.cat(pieces) if pieces else local[:0], local[begin:end])
            assert len(found) <= 2 * len(shape) - 1
    (one,) = placement.rectangles(mesh)
    assert one.sizes == tuple(s.stop - s.start for s in placement.slice_of(mesh))


@pytest.mark.fast
def test_an_interval_outside_the_local_tensor_is_refused() -> None:
    placement = sharded((4, 5), 0)
    with pytest.raises(ValueError, match=r"interval \[3, 11\) lies outside the 10 elements"):
        placement.rectangles(at("tp", 2, 0), (3, 11))
