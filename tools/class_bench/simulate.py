"""One rank of many, for real: its rows, the gathered batch, the graph's offsets for all classes. The other ranks are a stub that
answers at once with made-up values, so every number here is *simulated*: there is no communication in it, and no loss of meaning.

N classes, P ranks, N_r rows here, D width, B samples of all ranks, b of this one."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from opencoder.config import HeadConfig
from opencoder.model.classes.columns import ColumnGraph
from opencoder.model.classes.head import ClassHead
from opencoder.model.classes.memory import head_memory
from opencoder.model.classes.partition import Partition
from opencoder.parallel.group import Group
from opencoder.parallel.mesh import Mesh

from .steps import OPTIM


@dataclass(frozen=True, eq=False)
class StubGroup(Group):
    """A group of `size` of which this rank alone exists. The batch of the others must be set before it is gathered."""

    others: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)
    """By shape of this rank's part: the whole that a gather returns. For other shapes all ranks have what this one has."""

    def all_gather(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        whole = self.others.get(tuple(x.shape))
        if whole is None:
            return x.repeat(self.size, *[1] * (x.dim() - 1))
        own = self.rank * x.shape[0]
        whole[own : own + x.shape[0]] = x
        return whole if out is None else out.copy_(whole)

    def all_reduce(self, x: torch.Tensor, op: str = "sum") -> torch.Tensor:
        """As if the other ranks had values like this one's: equal maxima; sums as many times as large."""
        return x if op == "max" else x.mul_(self.size)

    def reduce_scatter(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        mine = x.chunk(self.size)[self.rank]
        return mine.clone() if out is None else out.copy_(mine)

    def barrier(self) -> None:
        """Nobody to wait for."""


def made_up_columns(partition: Partition, rows: int, neighbours: int) -> ColumnGraph:
    """N·K/P edges spread evenly over the classes, to random rows at random positions."""
    n, edges = partition.classes, partition.classes * neighbours // partition.parts
    offsets = torch.empty(n + 1, dtype=torch.int32)
    block = 1 << 22
    for begin in range(0, n + 1, block):  # in int64 as a whole it would be the largest thing here
        ids = torch.arange(begin, min(begin + block, n + 1))
        offsets[begin : begin + block] = (ids * edges).div_(n, rounding_mode="floor")
    draw = torch.Generator().manual_seed(0)
    local = torch.empty(edges, dtype=torch.int32).random_(0, rows, generator=draw)
    positions = torch.empty(edges, dtype=torch.int16).random_(0, neighbours, generator=draw)
    return ColumnGraph(offsets, local, positions, rows, neighbours)


def one_rank(_: Mesh, settings: dict[str, Any]) -> dict[str, Any]:
    """Seconds of steps, of their selection and of their products alone; peak memory of the process beside the calculator's sum."""
    torch.set_num_threads(settings["threads"])
    torch.ones(256, 256).mm(torch.ones(256, 256))
    before = resident_peak()
    ranks, dim, batch, rho, k = (settings[x] for x in ("ranks", "dim", "batch", "rho", "neighbours"))
    partition = Partition(settings["classes"], ranks)
    rows, own = partition.size(0), batch // ranks
    draw = torch.Generator().manual_seed(1)
    features = torch.randn(batch, dim, generator=draw)
    group = StubGroup(size=ranks, name="stub", others={(own, dim): features})
    config = HeadConfig(
        kind="class", classes=partition.classes, selection="knn", rho=rho, neighbours=k, permute=False, optimizer="sgd"
    )
    head = ClassHead(config, Mesh(dp=group, dp_cp=group, world=group), dim=dim, optim=OPTIM)
    with torch.no_grad():
        head.weight.normal_(0, dim**-0.5, generator=draw)
    columns = made_up_columns(partition, rows, k)
    head.columns = columns
    head.train()
    times: dict[str, list[float]] = {"step": [], "selection": [], "products": []}
    scored = 0
    for number in range(settings["rounds"] + 1):
        group.others[(own,)] = torch.randint(partition.classes, (batch,), generator=draw)
        found = _step(head, features[:own].clone().requires_grad_(), group.others[(own,)][:own].clone())
        assert head.selection is not None
        scored = head.selection.rows.numel()
        peak = resident_peak()  # before the products, whose buffers are the measurement's
        found["products"] = products(head.weight.detach()[:scored], features)
        if number:
            for name, seconds in found.items():
                times[name].append(seconds)
    formula = head_memory(
        partition.classes, ranks, dim, recipe="ours, sgd fp32", batch=batch, rho=rho, neighbours=k, compute_bytes=4
    )
    return {
        "times": times,
        "rows": rows,
        "scored": scored,
        "offsets": columns.offsets.numel(),
        "edges": columns.ids.numel(),
        "peak_bytes": peak,
        "before_bytes": before,
        "formula_bytes": formula.total,
        "kind": "simulated",
    }


def _step(head: ClassHead, features: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    start = time.perf_counter()
    count = head.begin_step([labels])
    selected = time.perf_counter()
    loss, _ = head.loss(features, labels)
    (loss / count).backward()
    head.grad_sq_norm()
    head.apply_gradients(OPTIM.lr, 1.0)
    return {"step": time.perf_counter() - start, "selection": selected - start}


def products(rows: torch.Tensor, features: torch.Tensor, block: int = 1024) -> float:
    """Seconds of the three products of a step, 6·B·m·D operations, in blocks that stay in cache, and nothing else."""
    dx, logits = torch.zeros_like(features), features.new_empty(block, len(features))
    dw = features.new_empty(block, features.shape[1])
    start = time.perf_counter()
    for w in rows.split(block):
        g, d = logits[: len(w)], dw[: len(w)]
        torch.mm(w, features.t(), out=g)
        torch.mm(g, features, out=d)
        dx.addmm_(g.t(), w)
    return time.perf_counter() - start


def resident_peak() -> int:
    """Bytes of the highest resident set of this process so far."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
