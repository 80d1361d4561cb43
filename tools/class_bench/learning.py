"""What a selection costs in accuracy: the same small network trained with each, on siblings that are easily confused.

As in sheet 2.8: cosine softmax of scale 30, SGD with momentum, lazy rows, one process; the network is residual, which bears a
higher rate."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from opencoder.config import HeadConfig, OptimConfig
from opencoder.console import ProgressBar
from opencoder.model.classes.columns import ColumnGraph
from opencoder.model.classes.graph import build_graph
from opencoder.model.classes.head import ClassHead
from opencoder.parallel.mesh import SINGLE, Mesh

from .steps import missing_mass
from .synthetic import Siblings

SCALE = 30.0


@dataclass(frozen=True)
class Method:
    """A way to choose classes."""

    selection: str
    uniform_mix: float = 0.0
    tail_correction: bool = False


METHODS = {
    "full": Method("full"),
    "random": Method("random"),
    "random, corrected": Method("random", tail_correction=True),
    "knn": Method("knn"),
    "knn, mix 0.3": Method("knn", uniform_mix=0.3),
    "knn, mix 0.3, corrected": Method("knn", uniform_mix=0.3, tail_correction=True),
}


@dataclass(frozen=True)
class Task:
    """What is learnt, and for how long."""

    classes: int = 2000
    dim: int = 64
    batch: int = 64
    steps: int = 4000
    rho: float = 0.1
    neighbours: int = 20
    rebuild: int = 250
    """Steps between two graphs; random classes before the first."""
    test: int = 2000
    lr: float = 0.1
    warmup: float = 0.1
    """Share of the steps over which the rate rises; it then falls as a cosine."""
    spread: float = 0.7
    noise: float = 0.5


class Network(nn.Module):
    """(B, D) → (B, D): x and what two layers add to it, nothing at first."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        last = nn.Linear(2 * dim, dim)
        nn.init.zeros_(last.weight)
        self.layers = nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(), last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        update: torch.Tensor = self.layers(x)
        return x + update


def learn(method: Method, task: Task, seed: int) -> dict[str, Any]:
    """Train once; top-1 over all classes on new samples, and the mean missing mass over training."""
    torch.manual_seed(seed)
    made = Siblings(task.classes, task.dim, spread=task.spread, noise=task.noise, seed=seed)
    optim = OptimConfig(name="sgd", lr=task.lr, momentum=0.9, weight_decay=0.0)
    config = HeadConfig(
        kind="class",
        classes=task.classes,
        variant="cosine",
        scale=SCALE,
        selection=method.selection,
        rho=task.rho,
        neighbours=task.neighbours,
        uniform_mix=method.uniform_mix,
        tail_correction=method.tail_correction,
        permute=False,
        optimizer="sgd",
    )
    head = ClassHead(config, Mesh(), dim=task.dim, optim=optim, seed=seed)
    nn.init.normal_(head.weight, std=task.dim**-0.5)
    network = Network(task.dim)
    backbone = torch.optim.SGD(network.parameters(), lr=task.lr / 10, momentum=0.9)
    head.train()
    mass, start = [], time.perf_counter()
    for step in range(task.steps):
        features, labels = _batch(made, step * task.batch, task.batch)
        if method.selection == "knn" and step and step % task.rebuild == 0:
            lists = build_graph(head.weight, head.partition, SINGLE, neighbours=task.neighbours)
            head.columns = ColumnGraph.from_rows(lists, head.partition, SINGLE)
        rate = rate_at(step, task)
        for group in backbone.param_groups:
            group["lr"] = task.lr / 10 * rate
        count = head.begin_step([labels])
        x = network(features)
        loss, _ = head.loss(x, labels)
        (loss / count).backward()
        if step % 50 == 0 and head.selection is not None:
            mass.append(_mass(head, x))
        backbone.step()
        backbone.zero_grad(set_to_none=True)
        head.apply_gradients(task.lr * rate, 1.0)
    seconds = time.perf_counter() - start
    features, labels = _batch(made, 2**40, task.test)
    with torch.no_grad():
        found = head.logits_topk(network(features), 1)[1][:, 0]
    top1 = float((found == labels).double().mean())
    return {"top1": top1, "missing_mass": float(np.mean(mass)) if mass else 0.0, "seconds": seconds}


def rate_at(step: int, task: Task) -> float:
    """Share of the peak rate."""
    rise = task.warmup * task.steps
    if step < rise:
        return (step + 1) / (rise + 1)
    return float(0.5 * (1 + np.cos(np.pi * (step - rise) / (task.steps - rise))))


def _batch(made: Siblings, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    features, labels = made.samples(np.arange(first, first + count))
    return torch.from_numpy(features), torch.from_numpy(labels)


@torch.no_grad()
def _mass(head: ClassHead, features: torch.Tensor) -> float:
    assert head.selection is not None
    unit = nn.functional.normalize
    return missing_mass(unit(head.weight), unit(features) * SCALE, head.selection.rows, SINGLE)


def compare(task: Task, seeds: int, methods: list[str]) -> dict[str, Any]:
    """Each method with each seed; mean top-1 and its distance to full softmax, in points."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in methods}
    with ProgressBar("learning", total=seeds * len(methods), unit="runs") as bar:
        for seed in range(seeds):
            for name, some in runs.items():
                some.append(learn(METHODS[name], task, seed))
                bar.advance(postfix=f"{name}: top-1 {some[-1]['top1']:.4f}")
    means = {name: float(np.mean([run["top1"] for run in some])) for name, some in runs.items()}
    rows = {
        name: {
            "top1": means[name],
            "behind_full_points": 100 * (means["full"] - means[name]) if "full" in means else None,
            "missing_mass": float(np.mean([run["missing_mass"] for run in some])),
            "seconds": float(np.mean([run["seconds"] for run in some])),
            "runs": some,
        }
        for name, some in runs.items()
    }
    return {"task": asdict(task), "seeds": seeds, "methods": rows}
