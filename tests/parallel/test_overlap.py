"""Column-parallel layers that communicate while they compute: same results, and the order of what happens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from opencoder.parallel.group import Group, Handle
from opencoder.parallel.layers import ColumnParallelLinear, columns
from opencoder.parallel.mesh import create_mesh
from opencoder.parallel.placement import placement_of
from tests.harness import run_ranks

WIDTHS = (8, 4, 4)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Watched(Group):
    """A group that writes down when its collectives start and when they are waited for."""

    def __init__(self, group: Group, events: list[str]) -> None:
        super().__init__(group.size, group.rank, group.process_group, group.name, group.ranks)
        object.__setattr__(self, "events", events)

    def watched(self, what: str, handle: Handle[torch.Tensor]) -> Handle[torch.Tensor]:
        self.events.append(f"start {what}")

        def finish() -> torch.Tensor:
            self.events.append(f"wait {what}")
            return handle.wait()

        return Handle((), finish)

    def start_all_reduce(self, *args: Any) -> Handle[torch.Tensor]:
        return self.watched("sum", super().start_all_reduce(*args))

    def start_reduce_scatter(self, *args: Any) -> Handle[torch.Tensor]:
        return self.watched("sum", super().start_reduce_scatter(*args))

    def start_all_gather(self, *args: Any) -> Handle[torch.Tensor]:
        return self.watched("gather", super().start_all_gather(*args))


class Products(TorchDispatchMode):
    """Writes down every matrix product."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_):
            self.events.append("product")
        return func(*args, **(kwargs or {}))


def both_ways(rank: int, world: int, tokens_split: bool) -> dict[str, Any]:
    torch.set_default_dtype(torch.float64)
    events: list[str] = []
    mesh = create_mesh(tp=world)
    tp = Watched(mesh.tp, events) if world > 1 else mesh.tp
    layers = [ColumnParallelLinear(12, n, tp=tp, tokens_split=tokens_split) for n in WIDTHS]
    with torch.no_grad():
        for i, layer in enumerate(layers):
            layer.weight.copy_(draw(WIDTHS[i], 12, seed=i)[placement_of(layer.weight).slice_of(mesh)])
    length = 6 // world if tokens_split else 6
    found: dict[str, Any] = {}
    for overlap in (False, True):
        x = draw(2, length, 12, seed=10 + (rank if tokens_split else 0)).requires_grad_()
        out = columns(x, *layers, overlap=overlap)
        total = torch.stack([(y * draw(*y.shape, seed=20 + rank)).sum() for y in out]).sum()
        events.clear()
        with Products(events):
            total.backward()
        found[f"{overlap}"] = [*(y.detach() for y in out), x.grad, *(layer.weight.grad for layer in layers)]
        for layer in layers:
            layer.weight.grad = None
    return found | {"events": events}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("tokens_split", [False, True])
def test_overlap_changes_nothing(world: int, tokens_split: bool) -> None:
    for found in run_ranks(both_ways, world, tokens_split):
        for plain, overlapped in zip(found["False"], found["True"], strict=True):
            assert torch.allclose(overlapped, plain, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("tokens_split", [False, True])
def test_weight_gradients_are_worked_out_while_the_sum_is_under_way(tokens_split: bool) -> None:
    gather = ["start gather"], ["wait gather"]
    start, wait = gather if tokens_split else ([], [])
    for found in run_ranks(both_ways, 2, tokens_split):
        assert found["events"] == [
            *start,
            *["product"] * 3,
            "start sum",
            *wait,
            *["product"] * 3,
            "wait sum",
        ]


def kept_and_frozen(rank: int, world: int) -> dict[str, Any]:
    tp = create_mesh(tp=world).tp
    layers = [ColumnParallelLinear(12, n, tp=tp, tokens_split=True) for n in WIDTHS]
    for layer in layers:
        torch.nn.init.ones_(layer.weight)
    layers[1].weight.requires_grad_(False)
    kept: list[tuple[int, ...]] = []

    def pack(saved: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(saved.shape))
        return saved

    x = torch.ones(2, 3, 12, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        out = columns(x, *layers, overlap=True)
    sum(y.sum() for y in out).backward()
    return {"kept": kept, "x": x.grad, "weights": [layer.weight.grad for layer in layers]}


def test_only_own_tokens_are_kept_and_a_frozen_weight_has_no_gradient() -> None:
    for found in run_ranks(kept_and_frozen, 2):
        assert found["kept"] == [(2, 3, 12), (4, 12), (2, 12), (2, 12)]
        assert torch.equal(found["x"], torch.full((2, 3, 12), 16.0))
        first, frozen, last = found["weights"]
        assert frozen is None
        assert torch.equal(first, torch.full((4, 12), 12.0))
        assert torch.equal(last, torch.full((2, 12), 12.0))
