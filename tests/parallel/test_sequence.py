"""Sequence parallelism: tokens split between the split layers, against whole layers and the whole model, fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from opencoder.config import ParallelConfig
from opencoder.model.decoder import Decoder, Documents, Part, named_parameters
from opencoder.model.initialise import build_model
from opencoder.parallel.collectives import gather_tokens, scatter_tokens
from opencoder.parallel.gradients import reduce_gradients
from opencoder.parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from opencoder.parallel.mesh import Mesh, create_mesh
from opencoder.parallel.placement import placement_of
from tests.harness import run_ranks
from tests.model.cases import batch, model_config

SPLIT = ParallelConfig(sequence_parallel=True)
DOCUMENTS = Documents(torch.tensor([0, 5, 16, 20, 32], dtype=torch.int32), 12)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def own_tokens(x: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    """(B, S, …) → this rank's share of the B·S tokens, (B, S/world, …)."""
    return x.flatten(0, 1).chunk(world)[rank].view(x.shape[0], -1, *x.shape[2:])


def whole_tokens(parts: list[torch.Tensor]) -> torch.Tensor:
    """The reverse of `own_tokens`."""
    return torch.cat([part.flatten(0, 1) for part in parts]).view(parts[0].shape[0], -1, *parts[0].shape[2:])


def split_layers(rank: int, world: int) -> dict[str, Any]:
    torch.set_default_dtype(torch.float64)
    mesh = create_mesh(tp=world)
    column = ColumnParallelLinear(12, 8, tp=mesh.tp, tokens_split=True)
    row = RowParallelLinear(8, 6, tp=mesh.tp, tokens_split=True)
    table = VocabParallelEmbedding(20, 12, tp=mesh.tp, tokens_split=True)
    whole = {column: draw(8, 12, seed=1), row: draw(6, 8, seed=2), table: draw(20, 12, seed=3)}
    with torch.no_grad():
        for layer, weight in whole.items():
            layer.weight.copy_(weight[placement_of(layer.weight).slice_of(mesh)])
    hidden = table(torch.arange(24).view(3, 8) % 20)
    out = row(torch.tanh(column(hidden)))
    (out * own_tokens(draw(3, 8, 6, seed=4), rank, world)).sum().backward()
    return {"hidden": hidden.detach(), "out": out.detach(), "grads": [w.weight.grad for w in (table, column, row)]}


@pytest.mark.parametrize("world", [1, 2, 4])
def test_layers_between_split_tokens_equal_whole_ones(world: int) -> None:
    table, column, row = (w.requires_grad_() for w in (draw(20, 12, seed=3), draw(8, 12, seed=1), draw(6, 8, seed=2)))
    hidden = F.embedding(torch.arange(24).view(3, 8) % 20, table)
    out = torch.tanh(hidden @ column.T) @ row.T
    (out * draw(3, 8, 6, seed=4)).sum().backward()
    results = run_ranks(split_layers, world)
    assert torch.equal(whole_tokens([found["hidden"] for found in results]), hidden)
    assert torch.allclose(whole_tokens([found["out"] for found in results]), out, rtol=1e-12, atol=1e-13)
    for i, (dim, truth) in enumerate([(0, table.grad), (0, column.grad), (1, row.grad)]):
        gathered = torch.cat([found["grads"][i] for found in results], dim)
        assert torch.allclose(gathered, truth, rtol=1e-12, atol=1e-13)


def there_and_back(rank: int, world: int) -> dict[str, torch.Tensor]:
    tp = create_mesh(tp=world).tp
    mine = draw(2, 3, 5, seed=rank).requires_grad_()
    (gather_tokens(mine, tp) * draw(2, 3 * world, 5, seed=10 + rank)).sum().backward()
    partial = draw(2, 3 * world, 5, seed=20 + rank).requires_grad_()
    scattered = scatter_tokens(partial, tp)
    (scattered * draw(2, 3, 5, seed=30 + rank)).sum().backward()
    return {"gather_grad": mine.grad, "scattered": scattered.detach(), "scatter_grad": partial.grad}


def test_gradients_of_gather_are_summed_and_those_of_scatter_gathered() -> None:
    results = run_ranks(there_and_back, 2)
    summed = draw(2, 6, 5, seed=10) + draw(2, 6, 5, seed=11)
    partials = draw(2, 6, 5, seed=20) + draw(2, 6, 5, seed=21)
    upstream = whole_tokens([draw(2, 3, 5, seed=30), draw(2, 3, 5, seed=31)])
    for rank, found in enumerate(results):
        assert torch.equal(found["gather_grad"], own_tokens(summed, rank, 2))
        assert torch.equal(found["scattered"], own_tokens(partials, rank, 2))
        assert torch.equal(found["scatter_grad"], upstream)


def model(mesh: Mesh, recompute: str = "none", part: Part | None = None) -> Decoder:
    config, settings = model_config(layers=3), {"dtype": torch.float64, "device": torch.device("cpu"), "seed": 1}
    return build_model(config, mesh, recompute=recompute, part=part, parallel=SPLIT, **settings)


def gradients(parts: list[Decoder], mesh: Mesh) -> dict[str, torch.Tensor]:
    found = {key: p for stage in parts for key, p in named_parameters(stage).items()}
    reduce_gradients([(p.grad, placement_of(p)) for p in found.values()], mesh)
    return {key: p.grad for key, p in found.items()}


def parts_and_recompute(rank: int, world: int) -> dict[str, Any]:
    mesh, (tokens, labels) = create_mesh(tp=world), batch(250, 2, 16)
    found: dict[str, Any] = {
        "slices": {k: placement_of(p).slice_of(mesh) for k, p in named_parameters(model(mesh)).items()}
    }
    for recompute in ("none", "full", "attention", "mlp"):
        whole = model(mesh, recompute)
        whole.loss(tokens, labels, DOCUMENTS)[0].backward()
        found[recompute] = gradients([whole], mesh)
    first, last = model(mesh, part=Part(range(2), True, False)), model(mesh, part=Part(range(2, 3), False, True))
    sent = first.hidden(tokens, DOCUMENTS)
    last.loss(sent, labels, DOCUMENTS)[0].backward()
    return found | {"parts": gradients([first, last], mesh), "sent": tuple(sent.shape)}


def test_parts_and_recompute_under_split_tokens_equal_the_whole_model() -> None:
    tokens, labels = batch(250, 2, 16)
    truth = model(Mesh())
    truth.loss(tokens, labels, DOCUMENTS)[0].backward()
    for found in run_ranks(parts_and_recompute, 2):
        assert found["sent"] == (2, 8, 64)
        for key, p in named_parameters(truth).items():
            whole = p.grad[found["slices"][key]]
            for run in ("none", "parts"):
                assert (found[run][key] - whole).norm() <= 1e-12 * whole.norm(), (run, key)
            for recompute in ("full", "attention", "mlp"):
                assert torch.equal(found[recompute][key], found["none"][key]), (recompute, key)


def kept_bytes(rank: int, world: int) -> dict[bool, int]:
    kept = {}
    for split in (False, True):
        sizes: dict[int, int] = {}

        def pack(x: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        parallel = ParallelConfig(sequence_parallel=split)
        decoder = build_model(
            model_config(),
            create_mesh(tp=world),
            dtype=torch.float32,
            device=torch.device("cpu"),
            seed=1,
            parallel=parallel,
        )
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = decoder.hidden(batch(250, 2, 32)[0])
        kept[split] = sum(sizes.values())
        assert out.shape == (2, 16 if split else 32, 64)
    return kept


def test_split_tokens_keep_less_for_the_backward_pass() -> None:
    hidden = 2 * 32 * 64 * 4
    for kept in run_ranks(kept_bytes, 2):
        # Of each of the five norms, half of the summed input that its backward needs; the first has the embedding's rows.
        assert kept[True] <= kept[False] - 5 * hidden // 2
