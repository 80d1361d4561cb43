"""The class head on 1, 2 and 4 ranks against torch's cross entropy in one process in fp64. Tests are numbered as in the list of
acceptance tests they stand for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from opencoder.model.classes import softmax
from opencoder.model.classes.partition import Partition
from opencoder.model.classes.permutation import Permutation
from opencoder.model.classes.rebuild import BuildOptions, GraphKeeper, Schedule
from opencoder.model.classes.selection import select_rows
from opencoder.parallel.group import Group
from tests.harness import run_cases, run_ranks

from .heads import B, D, N, config, distance, draw, head_on, mesh_of, own, reference, small_chunks


@small_chunks()
def one_step(rank: int, world: int, keys: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Loss and gradients of one step on this rank; the backbone is a matrix whose gradients are summed over data ranks.

    options: `data`, as `draw` makes it; `tp`; `scale`, feature_grad_scale; `cast`, type of features."""
    mesh = mesh_of(rank, world, tp=options.get("tp", 1))
    weight, inputs, backbone, labels = options.get("data") or draw()
    head = head_on(mesh, weight, config(**keys), feature_grad_scale=options.get("scale", 1.0))
    a = backbone.clone().requires_grad_()
    mine = own(labels, mesh)
    count = head.begin_step([mine])
    features = own(inputs, mesh) @ a
    reduces: list[int] = []
    kept, Group.start_all_reduce = Group.start_all_reduce, _counting(reduces)  # type: ignore[method-assign]
    try:
        total, statistics = head.loss(features.to(options.get("cast", features.dtype)), mine)
        forward = len(reduces)
        (total / count).backward()
    finally:
        Group.start_all_reduce = kept  # type: ignore[method-assign]
    assert a.grad is not None
    values = head.finished_gradient()
    assert head._rows is not None
    return {
        "loss": mesh.dp_cp.all_reduce(total.detach()) / count,
        "backbone": mesh.dp_cp.all_reduce(a.grad),
        "dW": torch.cat(head.groups.classes.gather_objects(values.clone())),
        "own dW": values,
        "ids": head._rows.ids,
        "norm": head.grad_sq_norm(),
        "losses": statistics["token_losses"],
        "reduces": (forward, len(reduces) - forward),
    }


def _counting(found: list[int]) -> Any:
    original = Group.start_all_reduce

    def count(self: Group, x: torch.Tensor, op: Any = "sum") -> Any:
        if self.size > 1:
            found.append(x.numel())
        return original(self, x, op)

    return count


@pytest.mark.parametrize(
    ("world", "tp", "class_group"),
    [(1, 1, "dp_cp"), (2, 1, "dp_cp"), (4, 1, "dp_cp"), (4, 2, "dp_cp"), (4, 2, "tp"), (4, 2, "world")],
)
def test_02_loss_and_gradients_equal_one_process(world: int, tp: int, class_group: str) -> None:
    found = run_ranks(one_step, world, {"class_group": class_group}, {"tp": tp})
    loss, dw, backbone = reference(*draw())
    for rank in found:
        assert distance(rank["loss"], loss) <= 2e-6
        assert distance(rank["dW"], dw) <= 1e-6
        assert distance(rank["backbone"], backbone) <= 1e-6
        torch.testing.assert_close(rank["norm"], dw.square().sum(), rtol=1e-5, atol=0)
        # 8: the local sum of exponentials is that of all ranks once, not once for each
        assert world == 1 or distance(rank["loss"], loss + math.log(world)) > 0.5


def test_02_in_fp64_all_is_equal_to_its_last_digits() -> None:
    data = draw(dtype=torch.float64)
    loss, dw, backbone = reference(*data)
    for rank in run_ranks(one_step, 4, {"class_group": "world"}, {"tp": 2, "data": data}):
        for name, truth in {"loss": loss, "dW": dw, "backbone": backbone}.items():
            assert float((rank[name] - truth).norm() / truth.norm()) <= 1e-11, name


def test_03_averaged_backbone_gradients_need_the_factor() -> None:
    cases = {scale: ({}, {"scale": scale}) for scale in (1.0, 4.0)}
    found = run_cases(one_step, 4, {str(scale): case for scale, case in cases.items()})
    _, dw, backbone = reference(*draw())
    right, without = found["4.0"][0], found["1.0"][0]
    assert distance(right["backbone"] / 4, backbone) <= 1e-6
    assert distance(right["dW"], dw) <= 1e-6
    assert distance(without["backbone"] / 4, backbone) > 100 * 1e-6


def shifted(by: float) -> tuple[torch.Tensor, ...]:
    """All logits of every sample raised by the same number: a feature of that size, and a column of ones."""
    weight, inputs, backbone, labels = draw()
    weight[:, 0], inputs[:, 0] = 1.0, by
    backbone[0], backbone[:, 0] = 0.0, 0.0
    backbone[0, 0] = 1.0
    return weight, inputs, backbone, labels


def test_04_large_logits_neither_overflow_nor_count() -> None:
    shifts = (0.0, 1e3, -1e3, 1e4, -1e4)
    found = run_cases(one_step, 2, {str(by): ({}, {"data": shifted(by)}) for by in shifts})
    losses = {by: float(found[str(by)][0]["loss"]) for by in shifts}
    assert abs(losses[1e3] - losses[0.0]) <= 1e-3
    assert abs(losses[-1e3] - losses[0.0]) <= 1e-3
    for by in (1e4, -1e4):
        assert math.isfinite(losses[by])
        assert bool(found[str(by)][0]["dW"].isfinite().all())


def test_04_bf16_features() -> None:
    found = run_ranks(one_step, 2, {}, {"cast": torch.bfloat16})
    loss, dw, _ = reference(*draw())
    assert abs(float(found[0]["loss"] / loss) - 1) <= 2e-2
    assert float((found[0]["dW"] - dw).norm() / dw.norm()) <= 2e-2


def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """16-bit products that are summed up in fp32, as there, by other means."""
    mm = torch.mm

    def wide_mm(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype | None = None, **more: Any) -> torch.Tensor:
        return mm(a, b, **more) if out_dtype is None else mm(a.to(out_dtype), b.to(out_dtype), **more)

    monkeypatch.setattr(torch, "mm", wide_mm)
    monkeypatch.setattr(softmax, "product_type", lambda features: features.dtype)


@pytest.mark.parametrize("variant", ["plain", "arcface"])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_04_products_of_16_bits(weights: torch.dtype, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch)
    data = draw(dtype=weights)
    found = one_step(0, 1, {"variant": variant}, {"data": data, "cast": torch.bfloat16})
    loss, dw, backbone = margin_reference(variant, data) if variant != "plain" else reference(*data)
    assert abs(float(found["loss"] / loss) - 1) <= 2e-2
    assert found["dW"].dtype == torch.float32
    assert float((found["dW"] - dw).norm() / dw.norm()) <= 2e-2
    assert float((found["backbone"] - backbone).norm() / backbone.norm()) <= 2e-2


def test_05_ignored_samples_on_some_ranks() -> None:
    weight, inputs, backbone, labels = draw()
    labels[[0, 1, 2, 3, 9, 17]] = -100  # of 4 ranks with 8 samples: 4, 1, 1, 0
    data = (weight, inputs, backbone, labels)
    loss, dw, truth = reference(*data)
    for rank in run_ranks(one_step, 4, {}, {"data": data}):
        assert distance(rank["loss"], loss) <= 2e-6
        assert distance(rank["dW"], dw) <= 1e-6
        assert distance(rank["backbone"], truth) <= 1e-6
    assert run_ranks(one_step, 1, {}, {"data": data})[0]["losses"][labels == -100].tolist() == [0.0] * 6


@pytest.mark.parametrize("world", [1, 2, 4])
def test_06_label_smoothing_is_that_of_all_classes(world: int) -> None:
    cases = {
        group: ({"label_smoothing": 0.1, "class_group": group}, {"tp": tp})
        for group, tp in (("dp_cp", 1), ("tp", world))
    }
    found = run_cases(one_step, world, cases)
    loss, dw, backbone = reference(*draw(), smoothing=0.1)
    for rank in found["dp_cp"] + found["tp"]:
        assert distance(rank["loss"], loss) <= 1e-5
        assert distance(rank["dW"], dw) <= 1e-6
        assert distance(rank["backbone"], backbone) <= 1e-6
    assert all(torch.equal(rank["losses"], found["tp"][0]["losses"]) for rank in found["tp"])


@pytest.mark.parametrize("keys", [{}, {"label_smoothing": 0.1}, {"variant": "arcface"}])
def test_07_two_all_reduces_forward_and_none_for_the_gradients(keys: dict[str, Any]) -> None:
    assert [rank["reduces"] for rank in run_ranks(one_step, 2, keys, {})] == [(2, 0)] * 2


def margin_reference(variant: str, data: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """By angles, in fp64."""
    weight, inputs, backbone, labels = data
    w, a = weight.double().clone().requires_grad_(), backbone.double().clone().requires_grad_()
    cosines = F.normalize(inputs.double() @ a) @ F.normalize(w).t()
    target = cosines.gather(1, labels[:, None])
    if variant == "arcface":
        target = (target.arccos() + 0.5).cos()
    elif variant == "cosface":
        target = target - 0.5
    loss = F.cross_entropy(30 * cosines.scatter(1, labels[:, None], target), labels)
    return loss.detach(), *torch.autograd.grad(loss, (w, a))


@pytest.mark.parametrize("world", [1, 4])
def test_09_cosine_heads_with_margins(world: int) -> None:
    data = draw(dtype=torch.float64)
    found = run_cases(one_step, world, {v: ({"variant": v}, {"data": data}) for v in ("cosine", "arcface", "cosface")})
    for variant, ranks in found.items():
        for name, truth in zip(("loss", "dW", "backbone"), margin_reference(variant, data), strict=True):
            for rank in ranks:
                assert float((rank[name] - truth).norm() / truth.norm()) <= 1e-11, (variant, name)
    single = {v: run_ranks(one_step, world, {"variant": v}, {})[0] for v in ("arcface",)}
    loss, dw, _ = margin_reference("arcface", draw())
    assert distance(single["arcface"]["loss"], loss) <= 3e-5  # logits of up to 30
    assert distance(single["arcface"]["dW"], dw) <= 1e-5


def test_10_a_rank_without_labels_has_the_gradients_of_the_sum() -> None:
    weight, inputs, backbone, labels = draw()
    data = (weight, inputs, backbone, labels % 200)  # classes 0–250 are rank 0's
    _, dw, truth = reference(*data)
    for number, rank in enumerate(run_ranks(one_step, 4, {}, {"data": data})):
        assert distance(rank["backbone"], truth) <= 1e-6
        assert distance(rank["dW"], dw) <= 1e-6
        assert number == 0 or float(rank["own dW"].abs().sum(1).min()) > 0


def full_and_selected(rank: int, world: int, keys: dict[str, Any]) -> list[dict[str, Any]]:
    return [one_step(rank, world, {**keys, **more}, {}) for more in ({}, {"selection": "random", "rho": 1.0})]


@pytest.mark.parametrize("keys", [{}, {"variant": "arcface", "label_smoothing": 0.1, "tail_correction": True}])
def test_25_random_with_all_classes_is_the_full_softmax(keys: dict[str, Any]) -> None:
    for full, chosen in run_ranks(full_and_selected, 2, keys):
        for name in ("loss", "dW", "backbone"):
            assert distance(full[name], chosen[name]) <= 1e-6, name


@pytest.mark.parametrize(
    ("keys", "tp"),
    [({}, 1), ({"variant": "cosine"}, 1), ({"label_smoothing": 0.1}, 1), ({"class_group": "tp"}, 2), ({}, 2)],
)
def test_25_random_tenth_is_a_softmax_over_those_classes(keys: dict[str, Any], tp: int) -> None:
    """Partial FC with the ids that were drawn: rows taken out of the matrix, labels numbered anew, torch's own loss."""
    found = run_ranks(one_step, 4, {"selection": "random", "rho": 0.1, **keys}, {"tp": tp})
    partition = Partition(N, 4 // tp)
    # Ranks 0 1 | 2 3 have the same samples with tp = 2; the classes are split within a pair, or between them.
    firsts, copies = {1: ([0, 1, 2, 3], [0, 1, 2, 3]), 2: ([0, 2], [1, 3])}[tp]
    if keys.get("class_group") == "tp":
        firsts, copies = [0, 1], [2, 3]
    ids = torch.cat([found[rank]["ids"] + partition.start(part) for part, rank in enumerate(firsts)])
    assert all(torch.equal(found[a]["ids"], found[b]["ids"]) for a, b in zip(firsts, copies, strict=True))
    weight, inputs, backbone, labels = draw()
    assert len(ids) == len(ids.unique()) < 0.2 * N
    w, a = weight.double().clone().requires_grad_(), backbone.double().clone().requires_grad_()
    features, rows = inputs.double() @ a, w[ids]
    if "variant" in keys:
        features, rows = F.normalize(features), 30 * F.normalize(rows)
    renumbered = torch.searchsorted(ids, labels)
    loss = F.cross_entropy(features @ rows.t(), renumbered, label_smoothing=keys.get("label_smoothing", 0.0))
    dw, backbone_gradient = torch.autograd.grad(loss, (w, a))
    for rank in found:
        assert distance(rank["loss"], loss.detach()) <= 1e-5
        assert distance(rank["dW"], dw[ids]) <= 2e-6
        assert distance(rank["backbone"], backbone_gradient) <= (2e-5 if "variant" in keys else 2e-6)


@small_chunks()
def evaluated(rank: int, world: int, tp: int) -> tuple[Any, ...]:
    mesh = mesh_of(rank, world, tp=tp)
    weight, inputs, _, labels = draw()
    weight[500:520] = weight[3]  # equal logits, on several ranks
    weight[990] = weight[700]
    inputs[0], inputs[1] = weight[3], weight[700]
    head = head_on(mesh, weight, config(class_group="world", selection="random", rho=0.1)).eval()
    mine = own(labels, mesh)
    count = head.begin_step([mine])
    with torch.no_grad():
        total, _ = head.loss(own(inputs, mesh), mine)
    logits, classes = head.logits_topk(own(inputs, mesh), 5)
    whole = mesh.dp_cp.all_gather(logits), mesh.dp_cp.all_gather(classes)
    return mesh.dp_cp.all_reduce(total) / count, *whole, (weight, inputs, labels)


@pytest.mark.parametrize(("world", "tp"), [(1, 1), (4, 1), (4, 2)])
def test_49_evaluation_is_over_all_classes_and_ties_go_to_the_smaller(world: int, tp: int) -> None:
    for loss, values, classes, (weight, inputs, labels) in run_ranks(evaluated, world, tp):
        logits = inputs.double() @ weight.double().t()
        assert distance(loss, F.cross_entropy(logits, labels)) <= 2e-6
        order = logits.float().sort(dim=1, descending=True, stable=True)  # stable: the smaller id first
        assert classes[0].tolist() == [3, 500, 501, 502, 503]
        assert classes[1].tolist()[:2] == [700, 990]
        assert torch.equal(classes, order.indices[:, :5])
        assert distance(values, order.values[:, :5]) <= 1e-5


@small_chunks()
def two_micro_batches(rank: int, world: int, parts: int) -> tuple[torch.Tensor, ...]:
    mesh = mesh_of(rank, world)
    weight, inputs, backbone, labels = draw()
    labels[:5] = -100
    head = head_on(mesh, weight, config(selection="random", rho=0.2, variant="cosine"))
    a = backbone.clone().requires_grad_()
    micro = list(zip(own(inputs, mesh).chunk(parts), own(labels, mesh).chunk(parts), strict=True))
    count = head.begin_step([y for _, y in micro])
    for x, y in micro:
        (head.loss(x @ a, y)[0] / count).backward()
    assert a.grad is not None
    norm = head.grad_sq_norm()
    values = head.finished_gradient().clone()
    head.apply_gradients(0.1, torch.tensor(0.5))
    return values, mesh.dp_cp.all_reduce(a.grad), norm.sqrt(), head.weight.detach(), count


def test_30_micro_batches_on_one_selection_add_up_to_one_batch() -> None:
    found = run_cases(two_micro_batches, 2, {"1": (1,), "4": (4,)})
    for one, four in zip(found["1"], found["4"], strict=True):
        assert int(one[4]) == int(four[4]) == B - 5
        assert all(distance(a, b) <= 1e-6 for a, b in zip(one, four, strict=True))


def bad_label(rank: int, world: int, ordered: bool) -> str:
    mesh = mesh_of(rank, world)
    head = head_on(mesh, draw()[0], config())
    labels = torch.tensor([5, N, -100] if rank == 1 else [5, 6, 7])
    if ordered:
        labels = Permutation(N, 5).rows_of(labels)
    with pytest.raises(ValueError, match="label") as caught:
        head.begin_step([labels])
    return str(caught.value)


@pytest.mark.parametrize("ordered", [False, True])
def test_labels_that_are_no_class_are_named_on_all_ranks(ordered: bool) -> None:
    for text in run_ranks(bad_label, 2, ordered):
        assert "label 1003 of sample 1 of data rank 1" in text
        assert "[0, 1003)" in text


def test_misuse_is_told() -> None:
    head = head_on(mesh_of(0, 1), draw()[0], config(selection="random", rho=0.05))
    labels, features = torch.arange(4), torch.randn(4, D, requires_grad=True)
    with pytest.raises(RuntimeError, match="begin_step"):
        head.loss(features, labels)
    with pytest.raises(ValueError, match="label -3 of sample 2"):
        head.begin_step([torch.tensor([1, 2, -3])])
    head.begin_step([labels])
    with pytest.raises(ValueError, match="one feature for each label"):
        head.loss(features[:, :5], labels)
    with pytest.raises(ValueError, match="the same labels in the same order"):
        head.loss(features, labels + 900)
    with pytest.raises(RuntimeError, match="no gradient"):
        head.grad_sq_norm()
    total, _ = head.loss(features, labels)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        total.backward()
    with pytest.raises(ValueError, match="k=0"):
        head.logits_topk(features, 0)


def with_graph(rank: int, world: int, keys: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    """Some steps with a graph from step 1 on; what each scored, on all ranks."""
    mesh = mesh_of(rank, world)
    weight, inputs, _, labels = draw()
    head = head_on(mesh, weight, config(selection="knn", **keys))
    options = BuildOptions(head.config.neighbours)
    keeper = GraphKeeper(head.partition, head.groups.classes, options, Schedule(first_step=1, every=2))
    found = []
    for step in range(steps):
        x = own(inputs, mesh).clone().requires_grad_()
        mine = own(labels.roll(step), mesh)
        keeper.before_step(step, head.weight.detach())
        head.columns = keeper.columns
        count = head.begin_step([mine])
        total, _ = head.loss(x, mine)
        (total / count).backward()
        assert head.selection is not None
        assert head._rows is not None
        assert head._rows.ids is not None
        ids = torch.cat(mesh.dp_cp.gather_objects(head._rows.ids + head.first))
        values = torch.cat(mesh.dp_cp.gather_objects(head.finished_gradient().clone()))
        dx = mesh.dp_cp.all_gather(x.grad)
        loss = mesh.dp_cp.all_reduce(total.detach()) / count
        found.append({"ids": ids, "dW": values, "dx": dx, "loss": loss, "metrics": head.metrics()})
        head.apply_gradients(0.1, None)
    return found


@pytest.mark.parametrize("world", [1, 4])
def test_17_all_neighbours_and_all_rows_are_the_full_softmax(world: int) -> None:
    weight, inputs, _, labels = draw()
    w, x = weight.double(), inputs.double()
    ranks = run_ranks(with_graph, world, {"neighbours": N, "rho": 1.0, "uniform_mix": 0.0}, 2)
    for found in ranks:
        assert "coverage" not in found[0]["metrics"]  # no graph yet
    momentum = torch.zeros_like(w)
    for step in range(2):
        parameter, features = w.clone().requires_grad_(), x.clone().requires_grad_()
        loss = F.cross_entropy(features @ parameter.t(), labels.roll(step))
        dw, dx = torch.autograd.grad(loss, (parameter, features))
        for found in ranks:
            assert distance(found[step]["loss"], loss) <= 1e-5
            assert distance(found[step]["dW"], dw) <= 1e-5
            assert distance(found[step]["dx"], dx) <= 1e-5
        momentum = 0.9 * momentum + dw + 0.01 * w
        w = w - 0.1 * momentum


def test_29_random_until_the_first_graph_then_the_neighbours_of_the_labels() -> None:
    keys = {"neighbours": 4, "rho": 0.2, "uniform_mix": 0.2}
    first, second, third = run_ranks(with_graph, 2, keys, 3)[0]
    assert torch.equal(first["ids"], random_ids(keys))
    weight, _, _, labels = draw()
    # The graph is of the weights after one step: few of so many lists differ from those before it.
    lists = (F.normalize(weight) @ F.normalize(weight).t()).topk(4).indices
    for step, found in ((0, first), (1, second), (2, third)):
        near = lists[labels.roll(step)].flatten().unique()
        share = float(torch.isin(near, found["ids"]).double().mean())
        assert share < 0.6 if step == 0 else share > 0.9


def random_ids(keys: dict[str, Any]) -> torch.Tensor:
    labels = draw()[3]
    partition = Partition(N, 2)
    parts = [select_rows(labels, partition, rank, rho=keys["rho"], seed=0, step=0).rows for rank in range(2)]
    return torch.cat([parts[0], parts[1] + partition.start(1)])


def permuted(rank: int, world: int) -> tuple[Any, ...]:
    """Rows in another order than classes."""
    mesh = mesh_of(rank, world)
    weight, inputs, _, labels = draw()
    order = Permutation(N, 5)
    head = head_on(mesh, weight[order.labels_of(torch.arange(N))], config())
    mine = order.rows_of(own(labels, mesh))
    count = head.begin_step([mine])
    total, _ = head.loss(own(inputs, mesh), mine)
    _, best = head.logits_topk(own(inputs, mesh), 5, class_of=order.labels_of)
    return mesh.dp_cp.all_reduce(total.detach()) / count, mesh.dp_cp.all_gather(best)


def test_rows_in_another_order_change_nothing() -> None:
    weight, inputs, _, labels = draw()
    logits = inputs.double() @ weight.double().t()
    for loss, best in run_ranks(permuted, 2):
        assert distance(loss, F.cross_entropy(logits, labels)) <= 2e-6
        assert torch.equal(best, logits.float().topk(5).indices)


def test_features_that_are_data_still_give_the_rows_a_gradient() -> None:
    weight, inputs, _, labels = draw()
    head = head_on(mesh_of(0, 1), weight, config())
    head.begin_step([labels])
    total, _ = head.loss(inputs, labels)
    total.backward()
    w = weight.double().requires_grad_()
    (truth,) = torch.autograd.grad(F.cross_entropy(inputs.double() @ w.t(), labels, reduction="sum"), w)
    assert distance(head.finished_gradient(), truth) <= 1e-5


def test_a_step_without_any_label_has_no_loss_and_no_gradient() -> None:
    head = head_on(mesh_of(0, 1), draw()[0], config(selection="random", rho=0.1))
    labels, x = torch.full((4,), -100), torch.randn(4, D, requires_grad=True)
    assert int(head.begin_step([labels])) == 0
    total, _ = head.loss(x, labels)
    total.backward()
    assert float(total.detach()) == float(head.grad_sq_norm()) == 0.0
    assert x.grad is not None
    assert not x.grad.any()
    assert "eps" not in head.metrics()  # of no sample
