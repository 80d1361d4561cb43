"""Updates of some rows, against torch's optimizers. Tests are numbered as in the list of acceptance tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from opencoder.config import OptimConfig
from opencoder.errors import ConfigError
from opencoder.model.classes import rows as rows_module
from opencoder.model.classes.head import ClassHead
from opencoder.model.classes.rows import RowOptimizer
from opencoder.model.classes.scored import ScoredRows
from opencoder.parallel.mesh import Mesh

from .heads import config, distance

OPTIM = OptimConfig(momentum=0.9, weight_decay=0.05, betas=(0.9, 0.95))
NAMES = ("sgd", "adamw")


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rows_module.CHUNK_ELEMENTS, "cpu", 64 * 8)


def optimizer(name: str, dtype: torch.dtype = torch.float32, **keys: Any) -> RowOptimizer:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(300, 8).to(dtype) * 0.1)
    return RowOptimizer(weight, config(optimizer=name, **keys), OPTIM)


def drawn(step: int, rows: RowOptimizer) -> tuple[ScoredRows, torch.Tensor]:
    g = torch.Generator().manual_seed(step)
    ids = torch.randperm(300, generator=g)[:100].sort().values
    dtype = torch.float64 if rows.weight.dtype == torch.float64 else torch.float32
    return ScoredRows(rows.weight, ids), torch.randn(100, 8, generator=g).to(dtype)


def torch_optimizer(name: str, p: torch.nn.Parameter) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD([p], lr=0.01, momentum=0.9, weight_decay=0.05)
    return torch.optim.AdamW([p], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_23_lazy_leaves_every_bit_of_other_rows(name: str, state_dtype: str, dtype: torch.dtype) -> None:
    rows = optimizer(name, dtype, state_dtype=state_dtype)
    for step in range(3):
        before = {"weight": rows.weight.detach().clone(), **{n: t.clone() for n, t in rows.state.items()}}
        chosen, g = drawn(step, rows)
        rows.step(chosen, g, lr=0.01)
        other = torch.ones(300, dtype=torch.bool)
        assert chosen.ids is not None
        other[chosen.ids] = False
        for key, tensor in {"weight": rows.weight, **rows.state}.items():
            assert torch.equal(tensor[other], before[key][other]), key
            assert bool((tensor[~other] != before[key][~other]).any(1).all()), key


@pytest.mark.parametrize(("dtype", "bar"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("name", NAMES)
def test_24_dense_equivalent_is_torch_with_zeros_elsewhere(name: str, dtype: torch.dtype, bar: float) -> None:
    rows = optimizer(name, dtype, row_update="dense_equivalent")
    p = torch.nn.Parameter(rows.weight.detach().clone())
    reference = torch_optimizer(name, p)
    for step in range(20):
        chosen, g = drawn(step, rows)
        rows.step(chosen, g, lr=0.01, clip=torch.tensor(0.5))
        p.grad = torch.zeros_like(p).index_copy_(0, chosen.ids, g * 0.5)
        reference.step()
    assert distance(rows.weight, p) <= bar
    for key, tensor in rows.state.items():
        assert distance(tensor, reference.state[p][key]) <= 10 * bar  # momenta sum up 10 gradients


@pytest.mark.parametrize("row_update", ["lazy", "dense_equivalent"])
@pytest.mark.parametrize("name", NAMES)
def test_24_all_rows_are_updated_in_place_as_by_torch(name: str, row_update: str) -> None:
    rows = optimizer(name, row_update=row_update)
    p = torch.nn.Parameter(rows.weight.detach().clone())
    reference = torch_optimizer(name, p)
    for step in range(20):
        g = torch.randn(300, 8, generator=torch.Generator().manual_seed(step))
        rows.step(ScoredRows(rows.weight), g, lr=0.01)
        p.grad = g
        reference.step()
    assert distance(rows.weight, p) <= 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_lazy_is_torch_on_rows_that_are_always_scored(name: str) -> None:
    rows = optimizer(name)
    ids = torch.arange(10, 150, 3)
    p = torch.nn.Parameter(rows.weight.detach()[ids].clone())
    reference = torch_optimizer(name, p)
    for step in range(20):
        p.grad = torch.randn(len(ids), 8, generator=torch.Generator().manual_seed(step))
        rows.step(ScoredRows(rows.weight, ids), p.grad, lr=0.01)
        reference.step()
    assert distance(rows.weight[ids], p) <= 1e-6


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("keys", [{}, {"state_dtype": "bf16"}, {"row_update": "dense_equivalent"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_skipped_update_changes_nothing(name: str, keys: dict[str, Any], dtype: torch.dtype) -> None:
    rows = optimizer(name, dtype, **keys)
    for step, skip in enumerate((False, True, False)):
        before = {"weight": rows.weight.detach().clone(), **{n: t.clone() for n, t in rows.state.items()}}
        chosen, g = drawn(step, rows)
        if skip:
            g[3, 3] = torch.nan
        rows.step(chosen, g, lr=0.01, clip=torch.tensor(1.0), skip=torch.tensor(skip))
        for key, tensor in {"weight": rows.weight, **rows.state}.items():
            assert torch.equal(tensor, before[key]) == skip, key
            assert bool(tensor.isfinite().all())
    assert rows.steps == 3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("skip", [True, False])
def test_a_device_need_not_be_asked_whether_to_skip(name: str, dtype: torch.dtype, skip: bool) -> None:
    """What is done on a GPU, where `skip` and the clip factor are tensors that the host does not read."""
    rows, other = optimizer(name, dtype), optimizer(name, dtype)
    chosen, g = drawn(0, rows)
    assert chosen.ids is not None
    if skip:  # a weight that was loaded without its master rows stays too
        for each in (rows, other):
            each.weight.detach().add_(1)
    rows.steps = 1
    rows._update(chosen.ids, g, 0.1, torch.tensor(0.5), torch.tensor(skip))
    other.step(ScoredRows(other.weight, chosen.ids), g, lr=0.1, clip=0.5, skip=torch.tensor(skip))
    for key, tensor in {"weight": rows.weight, **rows.state}.items():
        assert distance(tensor, {"weight": other.weight, **other.state}[key]) <= (0 if skip else 1e-6), key


@pytest.mark.parametrize("name", NAMES)
def test_bf16_weights_follow_master_rows_in_fp32(name: str) -> None:
    narrow, wide = optimizer(name, torch.bfloat16), optimizer(name)
    with torch.no_grad():
        wide.weight.copy_(narrow.weight)
    for step in range(20):
        for rows in (narrow, wide):
            rows.step(*drawn(step, rows), lr=1e-4)
    assert distance(narrow.state["master"], wide.weight) <= 1e-6
    assert torch.equal(narrow.weight, narrow.state["master"].bfloat16())


def test_bf16_state_stays_near_that_in_fp32() -> None:
    for name in NAMES:
        short, full = optimizer(name, state_dtype="bf16"), optimizer(name)
        start = full.weight.detach().clone()
        for step in range(20):
            for rows in (short, full):
                rows.step(*drawn(step, rows), lr=0.01)
        assert {t.dtype for t in short.state.values()} == {torch.bfloat16}
        assert float(((short.weight - full.weight).norm() / (full.weight - start).norm()).detach()) <= 0.02


def test_states_that_cannot_hold_second_moments_are_refused() -> None:
    with pytest.raises(ConfigError, match="squares of small gradients"):
        optimizer("adamw", state_dtype="fp16")
    weight = torch.nn.Parameter(torch.zeros(4, 2))
    with pytest.raises(ConfigError, match="fp16"):  # before there is any state
        ClassHead(config(optimizer="adamw", state_dtype="fp16"), Mesh(), dim=2, optim=OPTIM)
    with pytest.raises(ConfigError, match=r"betas\[1\]=0.999: bf16 has 8 bits"):
        RowOptimizer(weight, config(optimizer="adamw", state_dtype="bf16"), OptimConfig(betas=(0.9, 0.999)))
    RowOptimizer(weight, config(optimizer="sgd", state_dtype="fp16"), OPTIM)
