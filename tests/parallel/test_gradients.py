"""Reduction of gradients and their global norm against sums worked out here, over every kind of axis."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from opencoder.parallel import gradients as module
from opencoder.parallel.gradients import global_grad_norm, reduce_gradients
from opencoder.parallel.mesh import create_mesh
from opencoder.parallel.placement import Placement, replicated, sharded
from tests.harness import run_ranks

SHAPES = {"a": (40, 30), "b": (7,), "c": (300, 40), "d": (5, 3)}


def values(rank: int, key: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + ord(key))
    return torch.randn(SHAPES[key], generator=generator, dtype=torch.float64)


def reduced(rank: int, world: int, alone_bytes: int, bucket_bytes: int) -> dict[str, Any]:
    module.ALONE_BYTES, module.BUCKET_BYTES = alone_bytes, bucket_bytes
    mesh = create_mesh()
    mine = {key: values(rank, key) for key in SHAPES}
    mine["a"] = mine["a"].t().contiguous().t()  # a gradient need not be contiguous
    mesh.records.take()
    reduce_gradients([(mine[key], replicated(shape)) for key, shape in SHAPES.items()], mesh)
    return {"collectives": mesh.records.take().collectives, **mine}


@pytest.mark.parametrize(
    ("alone_bytes", "bucket_bytes", "collectives"),
    # bytes: a 9600, b 56, c 96000, d 120
    [(1 << 20, 1 << 20, 1), (10_000, 1 << 20, 2), (1 << 20, 96_000, 3), (0, 1, 4)],
)
def test_gradients_are_summed_in_few_collectives(alone_bytes: int, bucket_bytes: int, collectives: int) -> None:
    for found in run_ranks(reduced, 2, alone_bytes, bucket_bytes):
        assert found["collectives"] == collectives
        for key in SHAPES:
            assert torch.equal(found[key], values(0, key) + values(1, key))


def over_several_axes(rank: int, world: int) -> dict[str, torch.Tensor]:
    mesh = create_mesh(tp=2, kv_replicas=2)  # and dp 2
    kv = sharded((40, 30), 0, shards=1)
    partial_over_tp = Placement((7,), grad_sum_axes=("dp", "cp", "tp"))
    mine = {"a": values(rank, "a"), "b": values(rank, "b"), "c": values(rank, "c")}
    whole = sharded((600, 40), 0)
    reduce_gradients([(mine["a"], kv), (mine["b"], partial_over_tp), (mine["c"], whole)], mesh)
    return mine


def test_each_gradient_is_summed_over_its_own_axes() -> None:
    for rank, found in enumerate(run_ranks(over_several_axes, 4)):
        for key in ("a", "b"):
            assert torch.allclose(found[key], sum(values(r, key) for r in range(4)), rtol=0, atol=1e-14)
        assert torch.equal(found["c"], values(rank, "c") + values(rank ^ 2, "c"))


def norm(rank: int, world: int, sizes: dict[str, int]) -> torch.Tensor:
    """Every rank holds the rows of `a` of its tp and pp part, and all of `b` of its pp part; equal over dp."""
    mesh = create_mesh(**sizes)
    stage = mesh.pp.rank
    a, b = values(10 + stage, "a"), values(20 + stage, "b")
    placement = sharded((40, 30), 0)
    return global_grad_norm([(a[placement.slice_of(mesh)], placement), (b, replicated((7,)))], mesh)


@pytest.mark.parametrize("sizes", [{}, {"tp": 2}, {"pp": 2}, {"tp": 2, "pp": 2}, {"cp": 2}, {"pp": 4}], ids=str)
def test_the_norm_counts_every_value_once(sizes: dict[str, int]) -> None:
    parts = [values(10 + s, "a") for s in range(sizes.get("pp", 1))] + [
        values(20 + s, "b") for s in range(sizes.get("pp", 1))
    ]
    truth = torch.cat([p.flatten() for p in parts]).norm()
    found = run_ranks(norm, 4, sizes)
    assert all(torch.equal(one, found[0]) for one in found)
    assert float(found[0]) == pytest.approx(float(truth), rel=1e-14)


def norm_with_key_value_copies(rank: int, world: int) -> torch.Tensor:
    mesh = create_mesh(tp=4, kv_replicas=2)
    placement = sharded((40, 30), 0, shards=2)
    return global_grad_norm([(values(0, "a")[placement.slice_of(mesh)], placement)], mesh)


def test_the_norm_counts_copies_within_tp_once() -> None:
    for found in run_ranks(norm_with_key_value_copies, 4):
        assert float(found) == pytest.approx(float(values(0, "a").norm()), rel=1e-14)
