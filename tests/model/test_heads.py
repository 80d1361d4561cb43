"""The output head: both forms of its loss, whole and over a split vocabulary, and gradients asked for one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from opencoder.model.heads import VocabHead
from opencoder.parallel.mesh import create_mesh
from opencoder.parallel.placement import placement_of
from tests.harness import run_ranks

from .cases import model_config

WIDTH, VOCAB = 64, 256


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def targets_of_case() -> torch.Tensor:
    targets = torch.randint(0, VOCAB, (3, 7), generator=torch.Generator().manual_seed(5))
    targets[0, :3] = -100
    return targets


def head_gradients(
    rank: int, world: int, split_backward: bool, one_by_one: bool, z_loss: float = 0.0
) -> dict[str, Any]:
    torch.set_default_dtype(torch.float64)
    mesh = create_mesh(tp=world)
    head = VocabHead(model_config(head={"chunk_tokens": 5}), mesh, split_backward=split_backward, z_loss=z_loss)
    with torch.no_grad():
        head.weight.copy_(draw(VOCAB, WIDTH, seed=1)[placement_of(head.weight).slice_of(mesh)])
    hidden = draw(3, 7, WIDTH, seed=2).requires_grad_()
    total, stats = head.loss(hidden, targets_of_case())
    loss = total / 7
    if one_by_one:
        dx = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
        dw = torch.autograd.grad(loss, head.weight)[0]
    else:
        dx, dw = torch.autograd.grad(loss, [hidden, head.weight])
    found = {"total": total.detach(), "dx": dx, "dw": dw, "tokens": int(stats["tokens"])}
    return found | {name: stats[name] for name in ("token_losses", "z_loss")}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(("split_backward", "one_by_one"), [(False, False), (True, False), (True, True)])
def test_head_equals_cross_entropy_of_whole_logits(world: int, split_backward: bool, one_by_one: bool) -> None:
    weight, hidden = draw(VOCAB, WIDTH, seed=1).requires_grad_(), draw(3, 7, WIDTH, seed=2).requires_grad_()
    each = F.cross_entropy((hidden @ weight.T).flatten(0, 1), targets_of_case().flatten(), reduction="none")
    truth = each.sum()
    (truth / 7).backward()
    results = run_ranks(head_gradients, world, split_backward, one_by_one)
    for found in results:
        assert torch.allclose(found["total"], truth, rtol=1e-13)
        assert torch.allclose(found["token_losses"], each, rtol=1e-12)
        assert found["z_loss"] == 0
        assert found["tokens"] == int((targets_of_case() >= 0).sum())
        assert torch.allclose(found["dx"], hidden.grad, rtol=1e-12, atol=1e-13)
    assert torch.allclose(torch.cat([found["dw"] for found in results]), weight.grad, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("split_backward", [False, True])
def test_z_loss_is_in_the_gradients_and_not_in_the_value(world: int, split_backward: bool) -> None:
    weight, hidden = draw(VOCAB, WIDTH, seed=1).requires_grad_(), draw(3, 7, WIDTH, seed=2).requires_grad_()
    logits, targets = (hidden @ weight.T).flatten(0, 1), targets_of_case().flatten()
    each = F.cross_entropy(logits, targets, reduction="none")
    plain, z = each.sum(), 0.01 * (logits.logsumexp(-1)[targets >= 0] ** 2).sum()
    ((plain + z) / 7).backward()
    results = run_ranks(head_gradients, world, split_backward, False, 0.01)
    for found in results:
        assert torch.allclose(found["total"], plain, rtol=1e-12)
        assert torch.allclose(found["token_losses"], each, rtol=1e-11)
        assert torch.allclose(found["z_loss"], z, rtol=1e-12)
        assert torch.allclose(found["dx"], hidden.grad, rtol=1e-12, atol=1e-13)
    assert torch.allclose(torch.cat([found["dw"] for found in results]), weight.grad, rtol=1e-12, atol=1e-13)


def test_the_fused_loss_has_one_backward_only() -> None:
    """Why `split_backward` is there."""
    with pytest.raises(RuntimeError):
        head_gradients(0, 1, False, True)
