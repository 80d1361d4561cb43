"""A training step of the head alone, over all classes, random ones, or the nearest of the labels; the plain peer beside them.

N classes, N_r of this rank, D width, b samples of this rank, B of all."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from opencoder.config import HeadConfig, OptimConfig
from opencoder.model.classes.columns import ColumnGraph
from opencoder.model.classes.graph import build_graph
from opencoder.model.classes.head import ClassHead
from opencoder.model.classes.partition import Partition
from opencoder.model.classes.selection import select_rows
from opencoder.parallel.group import Group
from opencoder.parallel.mesh import Mesh

from .partial_fc import PartialFC
from .synthetic import Siblings

LOGIT_SCALE = 16.0
"""Features are so long, rows have length 1: logits as those of a trained cosine head."""
SIDES = ("full", "random", "knn", "peer")
OPTIM = OptimConfig(name="sgd", lr=0.01, momentum=0.9, weight_decay=0.0)


def time_steps(mesh: Mesh, settings: dict[str, Any]) -> dict[str, Any]:
    """Numbers of this rank: seconds of each step of each side, of the selection and of the products alone; missing mass."""
    made = Siblings(settings["classes"], settings["dim"], group=settings["neighbours"], seed=1)
    group, partition = mesh.dp_cp, Partition(settings["classes"], mesh.dp_cp.size)
    weight = torch.from_numpy(made.centres(_ids(partition, group)))
    columns = ColumnGraph.from_rows(siblings_graph(made, partition, group), partition, group)
    sides = {name: _side(name, mesh, weight, partition, columns, settings) for name in settings["sides"]}
    times: dict[str, list[float]] = {name: [] for name in (*sides, "selection", "products")}
    mass: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(settings["rounds"] + 1):  # the first one warms up
        features, labels = _batch(made, number, settings["batch"], group)
        found = {}
        for name, side in sides.items():
            found[name] = _timed(group, side, features.clone().requires_grad_(), labels)
            mass[name].append(missing_mass(weight, features[:16], side.scored, group))
        gathered = group.all_gather(labels)
        found["selection"] = _timed(group, _select, gathered, partition, group, columns, settings, number)
        found["products"] = _timed(group, _products, weight, group.all_gather(features))
        if number:
            for name, seconds in found.items():
                times[name].append(seconds)
    return {
        "times": times,
        "missing_mass": {name: sum(values) / len(values) for name, values in mass.items()},
        "scored": {
            name: side.scored.numel() if side.scored is not None else weight.shape[0] for name, side in sides.items()
        },
        "rows": weight.shape[0],
    }


def _ids(partition: Partition, group: Group) -> Any:
    return torch.arange(partition.start(group.rank), partition.start(group.rank + 1)).numpy()


def _batch(made: Siblings, number: int, batch: int, group: Group) -> tuple[torch.Tensor, torch.Tensor]:
    """Own part of batch `number`: features (b, D), labels (b,)."""
    own = batch // group.size
    first = number * batch + group.rank * own
    features, labels = made.samples(torch.arange(first, first + own).numpy())
    return torch.nn.functional.normalize(torch.from_numpy(features)) * LOGIT_SCALE, torch.from_numpy(labels)


def siblings_graph(made: Siblings, partition: Partition, group: Group) -> torch.Tensor:
    """(N_r, K) lists of the classes' own groups, K their size, known by construction: itself first, then by number."""
    ids = torch.arange(partition.start(group.rank), partition.start(group.rank + 1))
    k = made.group
    others = torch.arange(1, k).expand(len(ids), -1)
    offset = (ids % k)[:, None]
    lists = torch.cat([ids[:, None], ids[:, None] - offset + (offset + others) % k], 1)
    # The last group may be short: what would lie beyond the last class is taken from the classes before.
    return torch.where(lists < made.classes, lists, lists - k).int()


class _Head:
    """One of the head's own ways."""

    def __init__(self, head: ClassHead) -> None:
        self.head = head
        self.scored: torch.Tensor | None = None

    def __call__(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        count = self.head.begin_step([labels])
        self.scored = None if self.head.selection is None else self.head.selection.rows
        loss, _ = self.head.loss(features, labels)
        (loss / count).backward()
        self.head.grad_sq_norm()
        self.head.apply_gradients(OPTIM.lr, 1.0)


class _Peer:
    def __init__(self, peer: PartialFC) -> None:
        self.peer = peer
        self.scored: torch.Tensor | None = None

    def __call__(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        self.peer.step(features, labels)
        self.scored = self.peer.scored


def _side(
    name: str, mesh: Mesh, weight: torch.Tensor, partition: Partition, columns: ColumnGraph, settings: dict[str, Any]
) -> Any:
    if name == "peer":
        rho = settings["rho"]
        return _Peer(PartialFC(weight.clone(), partition, mesh.dp_cp, rho=rho, lr=OPTIM.lr, momentum=OPTIM.momentum))
    config = HeadConfig(
        kind="class",
        classes=settings["classes"],
        selection=name,
        rho=settings["rho"],
        neighbours=settings["neighbours"],
        uniform_mix=settings["uniform_mix"],
        permute=False,
        optimizer="sgd",
    )
    head = ClassHead(config, mesh, dim=weight.shape[1], optim=OPTIM)
    with torch.no_grad():
        head.weight.copy_(weight)
    if name == "knn":
        head.columns = columns
    head.train()
    return _Head(head)


def _timed(group: Group, work: Callable[..., object], *args: Any) -> float:
    group.barrier()
    start = time.perf_counter()
    work(*args)
    return time.perf_counter() - start


def _select(
    labels: torch.Tensor, partition: Partition, group: Group, columns: ColumnGraph, settings: dict[str, Any], step: int
) -> None:
    rho, mix = settings["rho"], settings["uniform_mix"]
    select_rows(labels, partition, group.rank, rho=rho, columns=columns, uniform_mix=mix, seed=0, step=step)


def _products(weight: torch.Tensor, features: torch.Tensor, rows: int = 512) -> None:
    """The three products of a full step, 6·B·N_r·D operations, in blocks that stay in cache: the rate that can be had."""
    dx = torch.zeros_like(features)
    logits, dw = features.new_empty(rows, len(features)), features.new_empty(rows, features.shape[1])
    for w in weight.split(rows):
        g = logits[: len(w)]
        torch.mm(w, features.t(), out=g)
        torch.mm(g, features, out=dw[: len(w)])
        dx.addmm_(g.t(), w)


def missing_mass(weight: torch.Tensor, features: torch.Tensor, scored: torch.Tensor | None, group: Group) -> float:
    """Mean share of the full softmax that lies outside the scored rows (local ids), over the samples of all ranks."""
    logits = group.all_gather(features.detach()) @ weight.t()
    highest = group.all_reduce(logits.amax(1), "max")
    mass = logits.sub_(highest[:, None]).exp_()
    inside = mass.sum(1) if scored is None else mass[:, scored].sum(1)
    sums = group.all_reduce(torch.stack([inside, mass.sum(1)]).double())
    return float((1 - sums[0] / sums[1]).mean())


def time_graph(mesh: Mesh, settings: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a whole graph, its recall on probe rows against brute force in fp64, and the rate of its products alone."""
    made = Siblings(settings["classes"], settings["dim"], seed=2)
    group, partition = mesh.dp_cp, Partition(settings["classes"], mesh.dp_cp.size)
    weight = torch.from_numpy(made.centres(_ids(partition, group)))
    k = settings["neighbours"]
    products = _timed(group, _graph_products, weight, group)
    group.barrier()
    start = time.perf_counter()
    lists = build_graph(weight, partition, group, neighbours=k, dtype=settings["dtype"])
    seconds = time.perf_counter() - start
    probe = torch.arange(0, weight.shape[0], max(1, weight.shape[0] // settings["probe_rows"]))
    return {"seconds": seconds, "products": products, **_recall(weight, lists, probe, partition, group, k)}


def _graph_products(weight: torch.Tensor, group: Group, rows: int = 512, tile: int = 1024) -> None:
    """As many products as the graph needs, 2·N_r·N·D operations, and nothing else."""
    out = weight.new_empty(rows * tile)
    for _ in range(group.size):  # the blocks of the others are as large, to within a row
        for a in weight.split(rows):
            for b in weight.split(tile):
                torch.mm(a, b.t(), out=out[: len(a) * len(b)].view(len(a), len(b)))


def _recall(
    weight: torch.Tensor, lists: torch.Tensor, probe: torch.Tensor, partition: Partition, group: Group, k: int
) -> dict[str, float]:
    """Share of the true lists' classes that were found; a class as near as the K-th counts as found too (ties)."""
    count = partition.size(0)
    padded = torch.zeros(count, weight.shape[1], dtype=torch.float64)
    padded[: weight.shape[0]] = torch.nn.functional.normalize(weight.double())
    blocks = group.all_gather(padded).view(group.size, count, -1)
    whole = torch.cat([blocks[r, : partition.size(r)] for r in range(group.size)])
    cosines = whole[probe + partition.start(group.rank)] @ whole.t()
    cosines.scatter_(1, (probe + partition.start(group.rank))[:, None], 2.0)  # itself is first
    least = cosines.topk(k, dim=1).values[:, -1:]
    found = (cosines.gather(1, lists[probe].long()) >= least - 1e-12).sum()
    totals = group.all_reduce(torch.tensor([float(found), float(probe.numel() * k)], dtype=torch.float64))
    return {"recall": float(totals[0] / totals[1]), "probe_rows": float(totals[1]) / k}
