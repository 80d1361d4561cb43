"""Split layers and the split loss against their whole counterparts, two and four ranks, fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from opencoder.parallel.cross_entropy import vocab_parallel_cross_entropy, vocab_parallel_linear_cross_entropy
from opencoder.parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from opencoder.parallel.mesh import create_mesh
from opencoder.parallel.placement import placement_of
from tests.harness import RankError, run_ranks


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def split_layers(rank: int, world: int) -> dict[str, Any]:
    torch.set_default_dtype(torch.float64)
    mesh = create_mesh(tp=world)
    tp = mesh.tp
    column, row = ColumnParallelLinear(12, 8, tp=tp), RowParallelLinear(8, 6, tp=tp)
    table = VocabParallelEmbedding(20, 12, tp=tp)
    whole = {column: draw(8, 12, seed=1), row: draw(6, 8, seed=2), table: draw(20, 12, seed=3)}
    with torch.no_grad():
        for layer, weight in whole.items():
            layer.weight.copy_(weight[placement_of(layer.weight).slice_of(mesh)])
    ids = torch.arange(20).view(4, 5)
    out = row(torch.tanh(column(table(ids))))
    (out * draw(4, 5, 6, seed=4)).sum().backward()
    return {"out": out.detach(), "grads": [layer.weight.grad for layer in (table, column, row)]}


@pytest.mark.parametrize("world", [1, 2, 4])
def test_split_layers_equal_whole_ones(world: int) -> None:
    table, column, row = (w.requires_grad_() for w in (draw(20, 12, seed=3), draw(8, 12, seed=1), draw(6, 8, seed=2)))
    out = torch.tanh(F.embedding(torch.arange(20).view(4, 5), table) @ column.T) @ row.T
    (out * draw(4, 5, 6, seed=4)).sum().backward()
    results = run_ranks(split_layers, world)
    for result in results:
        assert torch.allclose(result["out"], out, rtol=1e-12, atol=1e-13)
    for i, (dim, truth) in enumerate([(0, table.grad), (0, column.grad), (1, row.grad)]):
        gathered = torch.cat([result["grads"][i] for result in results], dim)
        assert torch.allclose(gathered, truth, rtol=1e-12, atol=1e-13)


def split_loss(rank: int, world: int, offset: float) -> dict[str, Any]:
    mesh = create_mesh(tp=world)
    weight = draw(24, 16, seed=1).chunk(world)[rank].clone().requires_grad_()
    hidden = (draw(10, 16, seed=2) + offset).requires_grad_()
    targets = targets_of_case()
    start = rank * (24 // world)
    found = vocab_parallel_linear_cross_entropy(
        hidden, weight, targets, vocab_start=start, group=mesh.tp, chunk_tokens=4
    )
    total = found.total
    (total / 7).backward()
    logits = (hidden.detach() @ weight.detach().T).requires_grad_()
    tokens = vocab_parallel_cross_entropy(logits, targets, vocab_start=start, group=mesh.tp).tokens
    assert torch.allclose(found.tokens, tokens, rtol=1e-12, atol=1e-13)
    (tokens * draw(10, seed=5)).sum().backward()
    return {"total": total.detach(), "dw": weight.grad, "dx": hidden.grad, "tokens": tokens.detach(), "dl": logits.grad}


def targets_of_case() -> torch.Tensor:
    return torch.tensor([0, 23, -100, 11, 12, 5, -100, 18, 6, 23])


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("offset", [0.0, 50.0], ids=["plain", "large logits"])
def test_split_loss_equals_whole_one(world: int, offset: float) -> None:
    weight, hidden = draw(24, 16, seed=1).requires_grad_(), (draw(10, 16, seed=2) + offset).requires_grad_()
    truth = F.cross_entropy(hidden @ weight.T, targets_of_case(), ignore_index=-100, reduction="sum")
    (truth / 7).backward()
    logits = (hidden.detach() @ weight.detach().T).requires_grad_()
    tokens = F.cross_entropy(logits, targets_of_case(), ignore_index=-100, reduction="none")
    (tokens * draw(10, seed=5)).sum().backward()
    results = run_ranks(split_loss, world, offset)
    for result in results:
        assert torch.allclose(result["total"], truth, rtol=1e-12)
        assert torch.allclose(result["tokens"], tokens, rtol=1e-12, atol=1e-13)
    assert torch.allclose(torch.cat([r["dw"] for r in results]), weight.grad, rtol=1e-11, atol=1e-12)
    assert torch.allclose(sum(r["dx"] for r in results), hidden.grad, rtol=1e-11, atol=1e-12)
    assert torch.allclose(torch.cat([r["dl"] for r in results], 1), logits.grad, rtol=1e-11, atol=1e-12)


def indivisible(rank: int, world: int) -> None:
    ColumnParallelLinear(8, 7, tp=create_mesh(tp=world).tp)


def test_a_width_that_does_not_divide_is_refused() -> None:
    with pytest.raises(RankError, match="output width=7 cannot be split over 2 ranks"):
        run_ranks(indivisible, 2)
