"""Parts of tensors: flat slices of shards, as the sharded optimizer holds them, saved at one layout, loaded at another."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from opencoder.checkpoint import native
from opencoder.checkpoint.parts import Tensors, global_part
from opencoder.checkpoint.replicas import check_replicas
from opencoder.parallel.mesh import Mesh, create_mesh
from opencoder.parallel.placement import Placement, replicated, sharded
from tests.harness import run_ranks

PLACEMENTS: dict[str, Placement] = {
    "norm": replicated((13,)),
    "rows": sharded((12, 7), 0),
    "columns": sharded((5, 8), 1),
    "shared": sharded((8, 3), 0),
    "one": replicated((1,)),
}


def placements(tp: int) -> dict[str, Placement]:
    """As a model has them: "shared" has two parts, fewer than tp 4 has ranks."""
    return {**PLACEMENTS, "shared": sharded((8, 3), 0, shards=min(2, tp))}


def truth(key: str) -> torch.Tensor:
    shape = PLACEMENTS[key].global_shape
    return torch.arange(1.0, 1 + math.prod(shape)).view(shape) * (1 + list(PLACEMENTS).index(key))


def parts(mesh: Mesh, flat: bool, *, empty: bool) -> tuple[dict[str, Any], torch.Tensor]:
    """Every tensor as this rank's shard of it, or the interval of that shard that its data-parallel rank owns, which
    ends in the middle of rows; all of them views of one buffer, with the true contents or zero."""
    found: dict[str, Any] = {}
    placed = placements(mesh.tp.size)
    locals_ = {key: truth(key)[p.slice_of(mesh)].flatten() for key, p in placed.items()}
    buffer = torch.zeros(sum(map(len, locals_.values())))
    begin = 0
    for key, local in locals_.items():
        placement, n = placed[key], len(local)
        low, high = (n * (mesh.dp.rank + i) // mesh.dp.size for i in (0, 1))
        part = local[low:high] if flat else local
        view = buffer[begin : begin + len(part)]
        begin += len(part)
        if not empty:
            view.copy_(part)
        shape = tuple(s.stop - s.start for s in placement.slice_of(mesh))
        found[key] = (view, placement, (low, high)) if flat else (view.view(shape), placement)
    return found, buffer


def save(rank: int, world: int, tp: int, flat: bool, folder: str) -> None:
    mesh = create_mesh(tp=tp)
    tensors: Tensors = parts(mesh, flat, empty=False)[0]
    native.write_parts(Path(folder) / "tensors", {k: global_part(p, mesh) for k, p in tensors.items()}, mesh.world)


def load(rank: int, world: int, tp: int, flat: bool, folder: str) -> bool:
    mesh = create_mesh(tp=tp)
    tensors, found = parts(mesh, flat, empty=True)
    native.load_tensors(Path(folder), tensors, mesh, checked=True)
    return torch.equal(found, parts(mesh, flat, empty=False)[1])


@pytest.mark.parametrize(("world", "tp", "flat"), [(4, 2, True), (4, 4, False), (3, 1, True)])
def test_flat_slices_and_shards_load_as_each_other(world: int, tp: int, flat: bool, tmp_path: Path) -> None:
    run_ranks(save, world, tp, flat, str(tmp_path))
    whole = {key: torch.zeros(p.global_shape) for key, p in PLACEMENTS.items()}
    native.load_whole(tmp_path, whole)
    for key, found in whole.items():
        assert torch.equal(found, truth(key)), key
    for other, other_tp, other_flat in ((4, 2, False), (4, 2, True), (2, 1, True)):
        assert all(run_ranks(load, other, other_tp, other_flat, str(tmp_path)))


def classes(axis: str) -> Tensors:
    """Rows of a class matrix: 11 over any number of ranks, on the first of them one more, and a state of 1 column."""
    replicas = {"tp": ("dp", "cp"), "dp_cp": ("tp",), "world": ()}[axis]
    shapes = {"weight": (11, 5), "momentum": (11, 5), "seen": (11,)}
    placements = {key: Placement(shape, 0, axis, replicas, grad_sum_axes=()) for key, shape in shapes.items()}
    return {key: (torch.empty(0), placement) for key, placement in placements.items()}


def true_classes(placement: Placement, mesh: Mesh) -> torch.Tensor:
    whole = torch.arange(1.0, 1 + math.prod(placement.global_shape)).view(placement.global_shape)
    return whole[placement.slice_of(mesh)].clone()


def save_classes(rank: int, world: int, layout: dict[str, Any], axis: str, folder: str) -> int:
    mesh = create_mesh(**layout)
    tensors: Tensors = {key: (true_classes(part[1], mesh), part[1]) for key, part in classes(axis).items()}
    check_replicas(tensors, mesh)
    native.write_parts(Path(folder) / "tensors", {k: global_part(p, mesh) for k, p in tensors.items()}, mesh.world)
    return len(tensors["weight"][0])


def load_classes(rank: int, world: int, layout: dict[str, Any], axis: str, folder: str) -> bool:
    mesh = create_mesh(**layout)
    truths = {key: true_classes(part[1], mesh) for key, part in classes(axis).items()}
    tensors = {key: (torch.zeros_like(truths[key]), part[1]) for key, part in classes(axis).items()}
    native.load_tensors(Path(folder), tensors, mesh, checked=True)
    return all(torch.equal(tensors[key][0], truth) for key, truth in truths.items())


def test_rows_that_do_not_divide_load_on_other_rank_counts(tmp_path: Path) -> None:
    saved = tmp_path / "4"
    assert run_ranks(save_classes, 4, {}, "dp_cp", str(saved)) == [3, 3, 3, 2]
    for world, layout, axis in ((2, {}, "dp_cp"), (3, {}, "world"), (1, {}, "dp_cp"), (4, {"tp": 2}, "tp")):
        assert all(run_ranks(load_classes, world, layout, axis, str(saved))), (world, axis)
    other = tmp_path / "3"
    run_ranks(save_classes, 3, {}, "world", str(other))
    assert run_ranks(load_classes, 1, {}, "dp_cp", str(other)) == [True]


def test_copies_of_the_class_group_are_written_once(tmp_path: Path) -> None:
    assert run_ranks(save_classes, 4, {"tp": 2}, "dp_cp", str(tmp_path)) == [6, 6, 5, 5]
    assert all(run_ranks(load_classes, 3, {}, "dp_cp", str(tmp_path)))


@pytest.mark.fast
def test_a_part_of_the_wrong_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"part of shape \(12,\) does not fit"):
        global_part((torch.zeros(12), replicated((13,))), Mesh())
    with pytest.raises(ValueError, match="does not fit"):
        global_part((torch.zeros(12), replicated((13,)), (0, 13)), Mesh())


@pytest.mark.fast
def test_a_part_cannot_be_computed_with() -> None:
    part = global_part((torch.zeros(13), replicated((13,))), Mesh())
    assert part.size() == (13,)
    with pytest.raises(TypeError, match="only stands for a tensor"):
        torch.add(part, 1)


def save_with_a_hole(rank: int, world: int, folder: str) -> str:
    mesh = create_mesh()
    end = 6 if rank == 0 else 13
    part = (torch.zeros(end - 7 * rank), replicated((13,)), (7 * rank, end))  # element 6 is nobody's
    try:
        native.write_parts(Path(folder) / "tensors", {"norm": global_part(part, mesh)}, mesh.world)
    except BaseException as error:  # CheckpointException is one
        return str(error)
    return "no error"


def test_a_hole_between_the_parts_is_an_error(tmp_path: Path) -> None:
    assert all("Failed to validate global plan" in text for text in run_ranks(save_with_a_hole, 2, str(tmp_path)))
