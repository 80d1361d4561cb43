"""The class head on 1, 2 and 4 ranks against torch's cross entropy in one process in fp64. Tests are numbered as in the list of
acceptance tests they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.harness import run_ranks

from .heads import config, distance, draw, head_on, mesh_of, own, reference


def one_step(rank: int, world: int, keys: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Loss and gradients of one step on this rank; the backbone is a matrix whose gradients are summed over data ranks."""
    mesh = mesh_of(rank, world, tp=options.get("tp", 1))
    weight, inputs, backbone, labels = draw()
    head = head_on(mesh, weight, config(**keys))
    a = backbone.clone().requires_grad_()
    mine = own(labels, mesh)
    count = head.begin_step([mine])
    total, statistics = head.loss(own(inputs, mesh) @ a, mine)
    (total / count).backward()
    assert a.grad is not None
    values = head.finished_gradient()
    return {
        "loss": mesh.dp_cp.all_reduce(total.detach()) / count,
        "backbone": mesh.dp_cp.all_reduce(a.grad),
        "dW": head.groups.classes.gather_objects(values.clone()),
        "norm": head.grad_sq_norm(),
        "losses": statistics["token_losses"],
    }


@pytest.mark.parametrize(
    ("world", "tp", "class_group"),
    [(1, 1, "dp_cp"), (2, 1, "dp_cp"), (4, 1, "dp_cp"), (4, 2, "dp_cp"), (4, 2, "tp"), (4, 2, "world")],
)
def test_02_loss_and_gradients_equal_one_process(world: int, tp: int, class_group: str) -> None:
    found = run_ranks(one_step, world, {"class_group": class_group}, {"tp": tp})
    loss, dw, backbone = reference(*draw())
    for rank in found:
        assert distance(rank["loss"], loss) <= 2e-6
        assert distance(torch.cat(rank["dW"]), dw) <= 1e-6
        assert distance(rank["backbone"], backbone) <= 1e-6
        torch.testing.assert_close(rank["norm"], dw.square().sum(), rtol=1e-5, atol=0)
