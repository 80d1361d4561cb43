"""What the sharded softmax leaves out, estimates, and holds in memory. Tests are numbered as in the list of acceptance tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from opencoder.model.classes import head as head_module
from opencoder.model.classes import probe, rows, scored
from opencoder.model.classes.scored import RowGradient, ScoredRows, Scratch
from opencoder.model.classes.softmax import Groups, Scoring, missing_mass, sharded_softmax
from opencoder.model.classes.variants import Variant
from opencoder.parallel.group import SINGLE
from tests.harness import run_ranks

from .heads import D, N, config, distance, draw, head_on, mesh_of, own, small_chunks

ALONE = Groups(SINGLE, SINGLE, SINGLE)
PLAIN = Variant()


def losses_of(x: torch.Tensor, labels: torch.Tensor, rows: ScoredRows, variant: Variant = PLAIN) -> torch.Tensor:
    return sharded_softmax(x, labels, rows.places(labels), Scoring(rows, ALONE, variant))[1]


def a_selection(labels: torch.Tensor) -> torch.Tensor:
    return torch.cat([labels, torch.arange(0, N, 7)]).unique()


@small_chunks()
@pytest.mark.parametrize("variant", [PLAIN, Variant("arcface", 10.0, 0.3)])
def test_22_missing_mass_is_what_the_loss_and_its_gradient_are_off_by(variant: Variant) -> None:
    weight, inputs, _, labels = draw()
    if variant.cosine:
        weight, inputs = torch.nn.functional.normalize(weight), torch.nn.functional.normalize(inputs)
    ids = a_selection(labels)
    scoring = Scoring(ScoredRows(weight, ids, offsets=torch.ones(len(ids))), ALONE, variant)
    eps = missing_mass(inputs, labels, labels, scoring)
    full, chosen = (losses_of(inputs, labels, ScoredRows(weight, i), variant) for i in (None, ids))
    assert 0.1 < float(eps.min()) < float(eps.max()) < 0.999
    assert distance(full - chosen, -torch.log1p(-eps)) <= 1e-4
    if variant.cosine:
        return
    p_full = (inputs.double() @ weight.double().t()).softmax(1)
    p_chosen = torch.zeros_like(p_full).index_copy_(1, ids, (inputs.double() @ weight[ids].double().t()).softmax(1))
    assert distance((p_full - p_chosen).abs().sum(1), 2 * eps) <= 1e-5
    assert distance(eps, 1 - p_full[:, ids].sum(1)) <= 1e-6


@small_chunks()
def probed(rank: int, world: int, keys: dict[str, Any]) -> tuple[dict[str, float], float]:
    """The head's own metric, and the same of all samples."""
    mesh = mesh_of(rank, world)
    weight, inputs, _, labels = draw()
    head = head_on(mesh, weight, config(**keys))
    mine = own(labels, mesh)
    head.begin_step([mine])
    head.loss(own(inputs, mesh), mine)
    assert head._rows is not None
    ids = torch.cat(mesh.dp_cp.gather_objects(head._rows.ids + head.first))
    p = (inputs.double() @ weight.double().t()).softmax(1)
    measured = torch.cat([part[: probe.SAMPLES // world] for part in (1 - p[:, ids].sum(1)).chunk(world)])
    return head.metrics(), float(measured.mean()), len(ids) / len(labels.unique())


@pytest.mark.parametrize("world", [1, 4])
def test_52_metrics_tell_the_missing_mass_of_the_probe_samples(world: int) -> None:
    for metrics, eps, active in run_ranks(probed, world, {"selection": "random", "rho": 0.2}):
        assert metrics["eps"] == pytest.approx(eps, abs=1e-6)
        assert metrics["active_per_label"] == pytest.approx(active)
        assert "coverage" not in metrics  # no graph


def test_26_tail_correction_makes_the_partition_sum_right_on_average() -> None:
    weight, inputs, _, labels = draw()
    head = head_on(mesh_of(0, 1), weight, config(selection="random", rho=0.1, tail_correction=True))
    truth = (inputs.double() @ weight.double().t()).exp().sum(1)
    target = (inputs * weight[labels]).sum(1)
    total, plain = torch.zeros(len(labels), dtype=torch.float64), torch.zeros(len(labels), dtype=torch.float64)
    for _ in range(2000):
        head.begin_step([labels])
        assert head._rows is not None
        total += (losses_of(inputs, labels, head._rows) + target).double().exp()
        plain += (losses_of(inputs, labels, ScoredRows(weight, head._rows.ids)) + target).double().exp()
    assert distance((total / 2000 / truth).mean(), torch.ones(())) <= 0.01
    assert float((plain / 2000 / truth).mean()) < 0.6


class Made(TorchDispatchMode):
    """Remembers the storages that operations return, by size."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor):
                self.bytes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return out


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_28_memory_is_that_of_the_scored_rows(optimizer: str, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`kept`: the rows are copied once, as short ones are."""
    monkeypatch.setattr(scored, "LEAST_ROWS", 64)
    monkeypatch.setattr(head_module, "KEPT_BYTES", scored.KEPT_BYTES if kept else 0)
    for module in (scored, rows):
        monkeypatch.setitem(module.CHUNK_ELEMENTS, "cpu", 1 << 13)
    classes, batch, rho = 20_000, 64, 0.1
    g = torch.Generator().manual_seed(0)
    weight, labels = torch.randn(classes, D, generator=g), torch.randint(classes, (batch,), generator=g)
    x = torch.randn(batch, D, generator=g, requires_grad=True)
    head = head_on(mesh_of(0, 1), weight, config(classes=classes, selection="random", rho=rho, optimizer=optimizer))
    state = {t.untyped_storage().data_ptr() for t in [head.weight, *head.optimizer.state.values()]}
    head.probe.measure = lambda *_: None  # type: ignore[method-assign]
    for _ in range(2):
        with Made() as made:
            head.begin_step([labels])
            total, _ = head.loss(x, labels)
            total.backward()
            head.grad_sq_norm()
            head.apply_gradients(0.1, 1.0)
        sizes = sorted((n for pointer, n in made.bytes.items() if pointer not in state), reverse=True)
        logits = batch * classes * rho * 4
        assert abs(sizes[0] / logits - 1) <= 0.05
        # The next are the rows and their gradient, (m, D), and then what belongs to a chunk or has a number for each class.
        rows_bytes = classes * rho * D * 4
        assert all(abs(size / rows_bytes - 1) <= 0.05 for size in sizes[1 : 2 + kept])
        assert sizes[2 + kept] <= classes * 8 + 4096
    # Used again, not made again.
    kinds = ["logits", "gradient", *(["rows"] if kept else [])]
    assert [t.nbytes for kind in kinds for t in head.scratch._free[kind]] == sizes[: 2 + kept]


@pytest.mark.parametrize("name", ["arcface", "cosface"])
def test_09_slopes_of_margins_are_their_derivatives(name: Any) -> None:
    """Beyond π − margin too, and where the sine is held."""
    cosines = torch.linspace(-1, 1, 201, dtype=torch.float64)
    variant = Variant(name, 30.0, 0.5)
    values, slopes = variant.margined(cosines)
    inner = cosines[1:-1]
    h = 1e-7
    numeric = (variant.margined(inner + h).cosines - variant.margined(inner - h).cosines) / (2 * h)
    assert distance(slopes[1:-1], numeric) <= 1e-4
    assert bool((values < cosines).all())
    assert bool(slopes.isfinite().all())


def test_losses_without_gradients_need_one_chunk_of_logits() -> None:
    weight, inputs, _, labels = draw()
    with Made() as made:
        losses_of(inputs, labels, ScoredRows(weight.repeat(100, 1)))
    assert max(made.bytes.values()) <= max(weight.nbytes * 100, scored.CHUNK_ELEMENTS["cpu"] * 4)
    assert sum(n == scored.CHUNK_ELEMENTS["cpu"] * 4 for n in made.bytes.values()) == 1


@small_chunks()
def test_a_second_micro_batch_adds_to_the_gradient() -> None:
    weight, inputs, _, labels = draw()
    x = inputs.requires_grad_()
    all_rows = ScoredRows(weight.requires_grad_())
    gradient = RowGradient(all_rows, Scratch())
    for _ in range(2):
        total, _ = sharded_softmax(x, labels, all_rows.places(labels), Scoring(all_rows, ALONE, PLAIN), gradient)
        total.backward()
    truth = torch.autograd.grad(torch.nn.functional.cross_entropy(x @ weight.t(), labels, reduction="sum"), weight)[0]
    assert distance(gradient.finish(), 2 * truth) <= 1e-5
    assert weight.grad is None
